// Tokens stay in place and are reached through `order`, where those of one adapter lie next to each other: its segment.
// Which tiles of tokens there are is read on the device.
#pragma once
#include "ops/cuda/fragments.h"

namespace pyfastpeft {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kTile = 16;         // tokens of an mma
constexpr int kShrinkPart = 512;  // features that a shrink item sums over

// Where the tokens of every adapter are. order and segments null: in their order, all of one adapter.
struct Routing {
  const int64_t* order;     // [T]
  const int64_t* segments;  // [L + 1]
  const int64_t* ranks;     // [L] or null
  int adapters, rank;       // L, R
  int tokens;               // T

  // Held within 0 .. R, since nobody has looked at values on a device.
  __device__ int rank_of(int adapter) const {
    return ranks ? static_cast<int>(max(int64_t(0), min(ranks[adapter], int64_t(rank)))) : rank;
  }
  __device__ int begin(int adapter) const { return segments ? static_cast<int>(segments[adapter]) : 0; }
  __device__ int end(int adapter) const { return segments ? static_cast<int>(segments[adapter + 1]) : tokens; }
  __device__ int64_t token(int position) const { return order ? order[position] : position; }
};

// A matrix of the tokens: rows of T at a stride.
template <class T>
struct Matrix {
  T* data;
  int64_t stride;
  int columns;
};

struct Tile {
  int adapter, first, count, rank;  // positions first .. first + count of `order`
};

// The sum of `value` over the block's threads before this one, and over all of them in `total`. shared: [kWarps]
__device__ inline int sum_before(int value, int* shared, int& total) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, sum = value;
  for (int distance = 1; distance < 32; distance *= 2) {
    int other = __shfl_up_sync(~0u, sum, distance);
    if (lane >= distance) sum += other;
  }
  __syncthreads();
  if (lane == 31) shared[warp] = sum;
  __syncthreads();
  total = 0;
  int before = sum - value;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += shared[w];
    total += shared[w];
  }
  return before;
}

// Whether it holds for any of the block's threads. shared: [kWarps]
__device__ inline bool any(bool holds, int* shared) {
  int threads;
  sum_before(holds, shared, threads);
  return threads > 0;
}

// Tiles of `size` positions: calls visit(number of its first tile, adapter, first position, end) for every adapter that
// has any, in some thread, and returns how many tiles there are. Adapters without a rank count where `empty`.
template <class Visit>
__device__ int for_adapters(const Routing& routing, int size, bool empty, int* shared, Visit visit) {
  int tiles = 0;
  for (int begin = 0; begin < routing.adapters; begin += kThreads) {
    int adapter = begin + threadIdx.x, first = 0, end = 0;
    if (adapter < routing.adapters && (empty || routing.rank_of(adapter) > 0)) {
      first = routing.begin(adapter);
      end = routing.end(adapter);
    }
    int total, before = sum_before((end - first + size - 1) / size, shared, total);
    if (end > first) visit(tiles + before, adapter, first, end);
    tiles += total;
  }
  return tiles;
}

// Tile `number` of those of `size` positions; of no tokens where there are fewer. shared: one.
__device__ inline Tile find_tile(const Routing& routing, int size, bool empty, int number, int* scan, Tile* shared) {
  if (threadIdx.x == 0) shared->count = 0;
  for_adapters(routing, size, empty, scan, [&](int tile, int adapter, int first, int end) {
    if (tile > number || number >= tile + (end - first + size - 1) / size) return;
    int start = first + (number - tile) * size;
    *shared = {adapter, start, min(size, end - start), routing.rank_of(adapter)};
  });
  __syncthreads();
  return *shared;
}

// sums[q] += rows of x for positions g and g + 8 of 16 times factor's rows 8q + g, over the features begin .. end. Rows
// of x that are null, and ranks beyond `ranks`, are zero. x: [T, K];  factor: [ranks, K], of T or float32
template <class T, bool vector, int count, class F>
__device__ __forceinline__ void shrink16(float (&sums)[count][4], const T* upper, const T* lower, const F* factor,
                                         int ranks, int features, int begin, int end) {
  constexpr int kUnrolled = count <= 2 && std::is_same_v<T, F> ? 2 : 1;
  int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll(kUnrolled)
  for (int k = begin + 8 * t; k - 8 * t < end; k += 32) {
    int valid = end - k;
    uint4 left = load8<T, vector>(upper + k, upper ? valid : 0), right = load8<T, vector>(lower + k, lower ? valid : 0);
    auto from = [&](int q) { return factor + int64_t(8 * q + g) * features + k; };
    auto there = [&](int q) { return 8 * q + g < ranks ? valid : 0; };
    if constexpr (std::is_same_v<T, F>) {
      uint4 rows[count];
#pragma unroll
      for (int q = 0; q < count; ++q) rows[q] = load8<T, vector>(from(q), there(q));
      multiply32<T>(sums, left, right, rows);
    } else {
#pragma unroll
      for (int q = 0; q < count; ++q) {
        float row[8];
        load8<vector>(row, from(q), there(q));
        multiply32_exact<T>(sums[q], left, right, row);
      }
    }
  }
}

// Shrink items of a launch: tile by tile, block of 8 * count ranks by block, part of the features by part.
struct ShrinkItems {
  int rank_blocks, parts;

  __host__ __device__ ShrinkItems(int rank, int features, int count)
      : rank_blocks((rank + 8 * count - 1) / (8 * count)), parts((features + kShrinkPart - 1) / kShrinkPart) {}
  __host__ __device__ int of_tile() const { return rank_blocks * parts; }
};

// planes[h, t, j] = the sum over the features of part h of x[t] . lora_A[a, j], for item's tile of tokens t and its
// ranks j. x: [T, K];  lora_A: [L, R, K];  planes: [parts, T, R];  sums: shared, [kWarps, kTile, 8 * count]
template <class T, bool vector, int count, class F>
__device__ void shrink_item(int item, const Tile* tiles, ShrinkItems items, Matrix<const T> x, const F* lora_A,
                            const Routing& routing, float* planes, float* sums) {
  Tile tile = tiles[item / items.of_tile()];
  int first_rank = item / items.parts % items.rank_blocks * 8 * count, part = item % items.parts;
  int ranks = min(tile.rank - first_rank, 8 * count);
  if (ranks <= 0) return;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  float own[count][4] = {};
  auto row = [&](int i) { return i < tile.count ? x.data + routing.token(tile.first + i) * x.stride : nullptr; };
  int begin = part * kShrinkPart + warp * (kShrinkPart / kWarps);
  shrink16<T, vector>(own, row(g), row(g + 8), lora_A + (int64_t(tile.adapter) * routing.rank + first_rank) * x.columns,
                      ranks, x.columns, begin, min(begin + kShrinkPart / kWarps, x.columns));
#pragma unroll
  for (int q = 0; q < count; ++q)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      sums[((warp * kTile) + g + i / 2 * 8) * 8 * count + 8 * q + 2 * t + i % 2] = own[q][i];
  __syncthreads();
  for (int i = threadIdx.x; i < tile.count * 8 * count; i += kThreads) {
    int token = i / (8 * count), j = i % (8 * count);
    if (j >= ranks) continue;
    float sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += sums[(w * kTile + token) * 8 * count + j];
    planes[(int64_t(part) * routing.tokens + routing.token(tile.first + token)) * routing.rank + first_rank + j] = sum;
  }
}

}  // namespace pyfastpeft
