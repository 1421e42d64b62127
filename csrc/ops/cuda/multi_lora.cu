// Grids follow from shapes alone, so that a launch may be captured in a graph and replayed with other slots. How sums
// are cut follows from shapes, too, and they are added up in order.
//
// With a base layer, many tokens go through the product of gemm.h in their own order. Where all tokens of a block have
// the same adapter, as those of sequences padded to multiples of kTailBlock do, it takes the branch along; a second
// pass adds that of tokens in other blocks. One token without an adapter makes a block one of these: zero times an
// infinite element of the others' adapter would not be zero.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "ops/cuda/base.h"
#include "ops/cuda/counters.h"
#include "ops/cuda/decode.h"
#include "ops/cuda/elements.h"
#include "ops/cuda/routing.h"
#include "ops/cuda/runtime.h"

namespace pyfastpeft {

namespace {

constexpr int kDecodeTokens = 128;  // up to so many go in one launch
constexpr int kLongTile = kTile * kWarps;
template <class T, class F>
constexpr int kRanks = std::is_same_v<T, F> ? 64 : 32;  // ranks of a factor that are in registers at once
constexpr int kColumns = 32 * kWarps;
constexpr int kGradientRanks = 32, kGradientColumns = 64;
constexpr size_t kScan = kWarps * sizeof(int) + sizeof(Tile);  // of shared memory, that find_tile takes
constexpr int kTailRank = 256;  // up to so many ranks are the tail of a product
constexpr int kBlocks = 1024;  // that a launch aims at where it may choose, whatever the device

// row[column ..] (+)= scale * the lane's eight columns of row g (+ 8 where `half`) in d, as dealt_row deals them.
template <class T, bool vector, bool add>
__device__ __forceinline__ void put_row(const float (&d)[4][4], int half, float scale, T* row, int column,
                                        int columns) {
  if constexpr (vector) {
    if (column >= columns) return;
    Run<T, true> run;
    if constexpr (add) run = Run<T, true>::load(row + column);
#pragma unroll
    for (int i = 0; i < 8; ++i) run.of[i] = (add ? run.of[i] : 0.f) + scale * d[i / 2][2 * half + i % 2];
    run.store(row + column);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (column + i >= columns) break;
      row[column + i] = T((add ? static_cast<float>(row[column + i]) : 0.f) + scale * d[i / 2][2 * half + i % 2]);
    }
  }
}

// rows[c][q] = the lane's part of factor's rows `column` to column + 31, ranks first_rank + 16c to + 15, as T.
// factor: [N, R]
template <class T, bool vector, class F>
__device__ __forceinline__ void load_factor(uint2 (&rows)[kRanks<T, F> / 16][4], const F* factor, int column,
                                            int columns, int first_rank, int ranks, int stride) {
  int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int c = 0; c < kRanks<T, F> / 16; ++c)
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      int n = column + dealt_row(g, q), j = first_rank + 16 * c + 4 * t;
      rows[c][q] = load4<T, vector>(factor + int64_t(n) * stride + j, n < columns ? ranks - j : 0);
    }
}

// --- decode: shrink and expand in one launch ---

template <class T, class F>
struct Branch {
  Matrix<const T> x;  // [T, K]
  const F* lora_A;    // [L, R, K]
  const F* lora_B;    // [L, N, R]
  const float* scaling;  // [L]
  Routing routing;
  Matrix<T> y;    // [T, N]
  float* s;       // [T, R]
  float* planes;  // [parts, T, R]
};

// Shared memory of decode_kernel, in order.
struct DecodeShared {
  size_t tiles, sums, total;

  __host__ __device__ DecodeShared(int most_tiles, int rank, int count)
      : tiles(16 * sizeof(int)),
        sums(tiles + most_tiles * sizeof(Tile)),
        total(sums + kTile * sizeof(float) * (kWarps * 8 * count > padded(rank) ? kWarps * 8 * count : padded(rank))) {}

  // Ranks of a row of s in shared memory.
  __host__ __device__ static int padded(int rank) { return (rank + 15) / 16 * 16 + 8; }
};

// On adapter a's tokens t:  s[t, j] = x[t] . lora_A[a, j] for j < ranks[a];  y[t] += scaling[a] * s[t] lora_B[a]^T.
//
// Blocks take shrink items, tile by rank block by part of the features, from a counter until none is left, and put down
// one plane for a part; then each expands its share of the tiles' columns, after all shrink items are done. Nobody
// waits while an item is not yet taken, so that no block has to be resident for another to end.
template <class T, class F, bool vector, int count>
__global__ void __launch_bounds__(kThreads, 2) decode_kernel(Branch<T, F> b, int* counters, int most_tiles) {
  auto* memory = shared_memory<char>();
  DecodeShared shared(most_tiles, b.routing.rank, count);
  auto* numbers = reinterpret_cast<int*>(memory);  // [kWarps] for sums, one for the item
  auto* tiles = reinterpret_cast<Tile*>(memory + shared.tiles);
  auto* sums = reinterpret_cast<float*>(memory + shared.sums);
  int *taken = counters, *done = counters + 1, *left = counters + 2;
  int next = threadIdx.x == 0 ? atomicAdd(taken, 1) : 0;
  const Routing& routing = b.routing;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4, rank = routing.rank;
  int tile_count = for_adapters(routing, kTile, false, numbers, [&](int tile, int adapter, int first, int end) {
    for (; first < end; first += kTile)
      tiles[tile++] = {adapter, first, min(kTile, end - first), routing.rank_of(adapter)};
  });
  ShrinkItems shrinks(rank, b.x.columns, count);
  int items = tile_count * shrinks.of_tile();

  for (;;) {
    if (threadIdx.x == 0) numbers[kWarps] = next;
    __syncthreads();
    int item = numbers[kWarps];
    if (item >= items) break;
    if (threadIdx.x == 0) next = atomicAdd(taken, 1);
    shrink_item<T, vector, count>(item, tiles, shrinks, b.x, b.lora_A, routing, b.planes, sums);
    __syncthreads();
    if (threadIdx.x == 0) add_release(done, 1);
  }

  int column_blocks = (b.y.columns + kColumns - 1) / kColumns;
  int64_t expands = int64_t(tile_count) * column_blocks;
  int begin = static_cast<int>(expands * blockIdx.x / gridDim.x),
      end = static_cast<int>(expands * (blockIdx.x + 1) / gridDim.x);
  int at_hand = -1;  // the tile whose s is in shared memory
  int stride = DecodeShared::padded(rank);
  for (int item = begin; item < end; ++item) {
    Tile tile = tiles[item / column_blocks];
    int column = item % column_blocks * kColumns + warp * 32;
    const F* factor = b.lora_B + int64_t(tile.adapter) * b.y.columns * rank;
    float own[4][4] = {};
    for (int first_rank = 0; first_rank < tile.rank; first_rank += kRanks<T, F>) {
      uint2 rows[kRanks<T, F> / 16][4];
      load_factor<T, vector>(rows, factor, column, b.y.columns, first_rank, tile.rank, rank);
      // lora_B is on its way; now wait for s.
      if (at_hand != item / column_blocks) {
        if (at_hand < 0) {
          if (threadIdx.x == 0)
            while (load_acquire(done) < items) continue;
        }
        __syncthreads();
        at_hand = item / column_blocks;
        for (int i = threadIdx.x; i < kTile * stride; i += kThreads) {
          int token = i / stride, j = i % stride;
          float sum = 0;
          if (token < tile.count && j < tile.rank) {
            int64_t at = routing.token(tile.first + token) * rank + j;
            for (int part = 0; part < shrinks.parts; ++part)
              sum += __ldcg(b.planes + int64_t(part) * routing.tokens * rank + at);
            if (item % column_blocks == 0) b.s[at] = sum;
          }
          sums[i] = sum;
        }
        __syncthreads();
      }
#pragma unroll
      for (int c = 0; c < kRanks<T, F> / 16; ++c) {
        int j = first_rank + 16 * c;
        if (j >= tile.rank) break;
        const float *upper = sums + g * stride + j + 4 * t, *lower = upper + 8 * stride;
        uint2 left = make_uint2(pack<T>(upper[0], upper[1]), pack<T>(upper[2], upper[3]));
        uint2 right = make_uint2(pack<T>(lower[0], lower[1]), pack<T>(lower[2], lower[3]));
        multiply16<T>(own, left, right, rows[c]);
      }
    }
    float scale = b.scaling[tile.adapter];
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (g + 8 * half < tile.count)
        put_row<T, vector, true>(own, half, scale, b.y.data + routing.token(tile.first + g + 8 * half) * b.y.stride,
                                 column + 8 * t, b.y.columns);
  }
  // The last to leave clears the counters for the next launch.
  __syncthreads();
  if (threadIdx.x == 0 && add_release(left, 1) == static_cast<int>(gridDim.x) - 1) *taken = *done = *left = 0;
}

// --- any number of tokens: shrink and expand by themselves ---

// planes[h, t, j] = scaling[a] * the sum over the features k of part h of x[t, k] factor[a, j, k], for adapter a's
// tokens t and j < ranks[a].  x: [T, K];  factor: [L, R, K];  scaling: [L] or null: 1;  planes: [parts, T, R]
template <class T, class F, bool vector, int count>
__global__ void __launch_bounds__(kThreads, 2)
    multi_shrink_kernel(Matrix<const T> x, const F* factor, const float* scaling, Routing routing, float* planes,
                        int tokens, int part) {
  auto* scan = shared_memory<int>();
  int rank_blocks = (routing.rank + 8 * count - 1) / (8 * count), first_rank = blockIdx.x % rank_blocks * 8 * count;
  Tile tile =
      find_tile(routing, kLongTile, false, blockIdx.x / rank_blocks, scan, reinterpret_cast<Tile*>(scan + kWarps));
  int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, begin = threadIdx.x / 32 * kTile;
  int ranks = min(tile.rank - first_rank, 8 * count);
  if (begin >= tile.count || ranks <= 0) return;
  int64_t token[2];
  for (int half = 0; half < 2; ++half) {
    int i = begin + g + 8 * half;
    token[half] = i < tile.count ? routing.token(tile.first + i) : -1;
  }
  float own[count][4] = {};
  shrink16<T, vector>(own, token[0] < 0 ? nullptr : x.data + token[0] * x.stride,
                      token[1] < 0 ? nullptr : x.data + token[1] * x.stride,
                      factor + (int64_t(tile.adapter) * routing.rank + first_rank) * x.columns, ranks, x.columns,
                      blockIdx.y * part, min(int(blockIdx.y + 1) * part, x.columns));
  float scale = scaling ? scaling[tile.adapter] : 1.f;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (token[half] < 0) continue;
    float* row = planes + (int64_t(blockIdx.y) * tokens + token[half]) * routing.rank + first_rank;
#pragma unroll
    for (int i = 0; i < 2 * count; ++i) {
      int j = i / 2 * 8 + 2 * t + i % 2;
      if (j < ranks) row[j] = scale * own[i / 2][2 * half + i % 2];
    }
  }
}

// sum[i] = sum over h of planes[h, i], in the order of h.  planes: [parts, size];  sum: [size]
__global__ void __launch_bounds__(kThreads)
    add_planes_kernel(const float* planes, float* sum, int64_t size, int parts) {
  int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= size) return;
  float total = 0;
  for (int h = 0; h < parts; ++h) total += planes[h * size + i];
  sum[i] = total;
}

// What the base layer's product takes along of the branch: that of blocks of tokens which all have the same adapter.
struct Whole {
  const int* adapters;  // [blocks of kTailBlock tokens]: of all tokens of a block, -1 where they differ or have none
  const int* rest;      // whether there are other blocks in which a token has an adapter

  __device__ bool has(int64_t token) const { return adapters && adapters[token / kTailBlock] >= 0; }
};

// y[t] (+)= scaling[a] * s[t, :ranks[a]] factor[a]^T on adapter a's tokens t that are not in `whole`.
// s: [T, R];  factor: [L, N, R];  scaling: [L] or null: 1;  y: [T, N]
template <class T, class F, bool vector, bool add>
__global__ void __launch_bounds__(kThreads)
    multi_expand_kernel(const float* s, const F* factor, const float* scaling, Routing routing, Matrix<T> y,
                        Whole whole) {
  if (whole.rest && !*whole.rest) return;
  auto* scan = shared_memory<int>();
  Tile tile = find_tile(routing, kLongTile, !add, blockIdx.x, scan, reinterpret_cast<Tile*>(scan + kWarps));
  int* tokens = scan + kScan / sizeof(int);  // [kLongTile]
  int mine = -1;
  if (threadIdx.x < tile.count) mine = static_cast<int>(routing.token(tile.first + threadIdx.x));
  if (mine >= 0 && whole.has(mine)) mine = -1;
  if (threadIdx.x < kLongTile) tokens[threadIdx.x] = mine;
  if (!any(mine >= 0, scan)) return;
  int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, column = blockIdx.y * kColumns + threadIdx.x / 32 * 32;
  if (column >= y.columns) return;
  const F* rows_at = factor + int64_t(tile.adapter) * y.columns * routing.rank;
  float scale = scaling ? scaling[tile.adapter] : 1.f;
  uint2 rows[kRanks<T, F> / 16][4];
  for (int begin = 0; begin < tile.count; begin += kTile) {
    int64_t token[2] = {tokens[begin + g], tokens[begin + g + 8]};
    float own[4][4] = {};
    for (int first_rank = 0; first_rank < tile.rank; first_rank += kRanks<T, F>) {
      if (begin == 0 || tile.rank > kRanks<T, F>)
        load_factor<T, vector>(rows, rows_at, column, y.columns, first_rank, tile.rank, routing.rank);
#pragma unroll
      for (int c = 0; c < kRanks<T, F> / 16; ++c) {
        int j = first_rank + 16 * c + 4 * t;
        if (first_rank + 16 * c >= tile.rank) break;
        uint2 left[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float e[4];
          const float* from = s + token[half] * routing.rank + j;
#pragma unroll
          for (int i = 0; i < 4; ++i) e[i] = token[half] >= 0 && j + i < tile.rank ? from[i] : 0.f;
          left[half] = make_uint2(pack<T>(e[0], e[1]), pack<T>(e[2], e[3]));
        }
        multiply16<T>(own, left[0], left[1], rows[c]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (token[half] >= 0)
        put_row<T, vector, add>(own, half, scale, y.data + token[half] * y.stride, column + 8 * t, y.columns);
  }
}

// --- the branch as the tail of the base layer's product ---

// adapters[t] = that of token t, -1 where it has none;  rest = 0.  adapters: [T];  rest: [1]
__global__ void __launch_bounds__(kThreads) adapters_kernel(Routing routing, int* adapters, int* rest) {
  int position = blockIdx.x * kThreads + threadIdx.x, first = 0, last = routing.adapters;
  if (position == 0) *rest = 0;
  if (position >= routing.tokens) return;
  while (first < last) {
    int middle = (first + last) / 2;
    if (routing.end(middle) <= position) {
      first = middle + 1;
    } else {
      last = middle;
    }
  }
  bool one = first < routing.adapters && position >= routing.begin(first);
  adapters[routing.token(position)] = one ? first : -1;
}

// s[t, j] = sum over h of planes[h, t, j], in the order of h;  tail[t, j] = scaling[a] * s[t, j] for j < ranks[a] where
// a is the adapter of all tokens of t's block of kTailBlock, else 0;  whole = what that is of every block;  rest = 1
// where there is another block in which a token has an adapter.
// adapters: [T];  planes: [parts, T, R];  s: [T, R], or planes itself;  scaling: [L] or null: 1;  tail: [T, stride];
// whole: [blocks]
template <class T>
__global__ void __launch_bounds__(kThreads)
    tail_kernel(const int* adapters, const float* planes, int parts, const float* scaling, Routing routing, float* s,
                T* tail, int stride, int* whole, int* rest) {
  static_assert(kTailBlock == kThreads && kTailBlock % kTile == 0);
  auto* scan = shared_memory<int>();
  int tokens = routing.tokens, first = blockIdx.x * kTile, begin = first / kTailBlock * kTailBlock;
  int adapter = adapters[begin], own = begin + threadIdx.x;
  if (any(own < tokens && adapters[own] != adapter, scan)) {
    adapter = -1;
    if (threadIdx.x == 0 && first == begin) atomicExch(rest, 1);
  }
  if (threadIdx.x == 0 && first == begin) whole[first / kTailBlock] = adapter;
  int rank = adapter < 0 ? 0 : routing.rank_of(adapter);
  float scale = scaling && adapter >= 0 ? scaling[adapter] : 1.f;
  for (int i = threadIdx.x; i < min(kTile, tokens - first) * stride; i += kThreads) {
    int j = i % stride;
    int64_t token = first + i / stride, at = token * routing.rank + j;
    float sum = 0;
    if (j < routing.rank) {
      for (int h = 0; h < parts; ++h) sum += planes[int64_t(h) * tokens * routing.rank + at];
      s[at] = sum;
    }
    tail[token * stride + j] = T(j < rank ? scale * sum : 0.f);
  }
}

// out[a, i, j] = in[a, i, j], or 0 where the rank of the two is not below ranks[a], for the adapters of whole blocks.
// in: [L, rows, columns];  out: [L, rows, stride];  whole: [blocks];  ranks are the rows or the columns
template <class T, class F>
__global__ void __launch_bounds__(kThreads)
    tail_factor_kernel(const F* in, T* out, int64_t rows, int columns, int stride, bool ranks_are_rows, Routing routing,
                       const int* whole, int blocks) {
  int adapter = blockIdx.y, rank = routing.rank_of(adapter);
  bool used = false;
  for (int i = threadIdx.x; i < blocks; i += kThreads) used |= whole[i] == adapter;
  if (!any(used, shared_memory<int>())) return;
  in += adapter * rows * columns, out += adapter * rows * stride;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < rows * stride; i += gridDim.x * kThreads) {
    int64_t row = i / stride, column = i % stride;
    out[i] = column < columns && (ranks_are_rows ? row : column) < rank ? T(float(in[row * columns + column])) : T(0.f);
  }
}

// --- backward ---

// out[a, c, r] = in[a, r, c] for adapters with tokens, if `needed` (null: yes).  in: [L, rows, columns]
template <class T>
__global__ void __launch_bounds__(kThreads)
    transpose_kernel(const T* in, T* out, const int64_t* segments, const int* needed, int rows, int columns) {
  if ((needed && !*needed) || segments[blockIdx.y] == segments[blockIdx.y + 1]) return;
  auto* shared = shared_memory<T>();  // [32, 33]
  int column_blocks = (columns + 31) / 32, row = blockIdx.x / column_blocks * 32,
      column = blockIdx.x % column_blocks * 32;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t first = int64_t(blockIdx.y) * rows * columns;
  for (int i = warp; i < 32; i += kWarps)
    if (row + i < rows && column + lane < columns)
      shared[i * 33 + lane] = in[first + int64_t(row + i) * columns + column + lane];
  __syncthreads();
  for (int i = warp; i < 32; i += kWarps)
    if (column + i < columns && row + lane < rows)
      out[first + int64_t(column + i) * rows + row + lane] = shared[lane * 33 + i];
}

// rows[t] = 0 for the tokens of no adapter.
template <class T>
__global__ void __launch_bounds__(kThreads) zero_kernel(Matrix<T> rows, Routing routing, int tokens) {
  for (int position = blockIdx.x; position < tokens; position += gridDim.x) {
    if (position >= routing.begin(0) && position < routing.end(routing.adapters - 1)) continue;
    T* row = rows.data + routing.token(position) * rows.stride;
    for (int k = threadIdx.x; k < rows.columns; k += kThreads) row[k] = T(0.f);
  }
}

// The gradient of an adapter's factor: element (a, j, f) lies at a R F + j * rank_stride + f * column_stride.
template <class Factor>
struct Gradient {
  Factor* out;    // or null, and
  float* planes;  // [parts, L, R, F]
  int64_t rank_stride, column_stride;
};

// gradient[a, j, f] = scaling[a] * the sum over adapter a's tokens t of s[t, j] v[t, f] for j < ranks[a], else 0.
// v: [T, F];  s: [T, R];  scaling: [L] or null: 1
//
// A block has 32 ranks and 64 columns; its warps take turns at the tokens, 16 at a time, as do the parts.
template <class T, class Factor, bool vector>
__global__ void __launch_bounds__(kThreads)
    multi_gradient_kernel(Matrix<const T> v, const float* s, const float* scaling, Routing routing,
                          Gradient<Factor> gradient) {
  int adapter = blockIdx.y, rank = routing.rank_of(adapter),
      rank_blocks = (routing.rank + kGradientRanks - 1) / kGradientRanks;
  int first_rank = blockIdx.x % rank_blocks * kGradientRanks, column = blockIdx.x / rank_blocks * kGradientColumns;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  int position = routing.begin(adapter), end = routing.end(adapter);
  if (gradient.planes && (position == end || first_rank >= rank)) return;
  if (first_rank >= rank) end = position;
  float own[kGradientRanks / 16][8][4] = {};
  for (position += (blockIdx.z * kWarps + warp) * kTile; position < end; position += gridDim.z * kWarps * kTile) {
    int64_t token[4];
    uint4 rows[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      token[i] = position + 4 * t + i < end ? routing.token(position + 4 * t + i) : -1;
      int f = column + 8 * g;
      rows[i] = load8<T, vector>(v.data + token[i] * v.stride + f, token[i] < 0 ? 0 : v.columns - f);
    }
    // Ranks g and g + 8 of 16, of tokens 4t to 4t + 3.
    float left[kGradientRanks / 16][2][4];
#pragma unroll
    for (int block = 0; block < kGradientRanks / 16; ++block)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int j = first_rank + 16 * block + 8 * half + g;
#pragma unroll
        for (int i = 0; i < 4; ++i)
          left[block][half][i] = token[i] >= 0 && j < rank ? s[token[i] * routing.rank + j] : 0.f;
      }
#pragma unroll
    for (int q = 0; q < 8; ++q) {
      // Column q of the lane's eight, of the same tokens.
      auto word = [&](const uint4& row) { return q < 2 ? row.x : q < 4 ? row.y : q < 6 ? row.z : row.w; };
      if constexpr (std::is_same_v<T, Factor>) {
        uint32_t which = q % 2 ? 0x7632 : 0x5410;
        uint32_t right[] = {__byte_perm(word(rows[0]), word(rows[1]), which),
                            __byte_perm(word(rows[2]), word(rows[3]), which)};
#pragma unroll
        for (int block = 0; block < kGradientRanks / 16; ++block) {
          auto& [upper, lower] = left[block];
          uint32_t packed[] = {pack<T>(upper[0], upper[1]), pack<T>(lower[0], lower[1]), pack<T>(upper[2], upper[3]),
                               pack<T>(lower[2], lower[3])};
          mma<T>(own[block][q], packed, right);
        }
      } else {
        float right[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float2 pair = unpack<T>(word(rows[i]));
          right[i] = q % 2 ? pair.y : pair.x;
        }
#pragma unroll
        for (int block = 0; block < kGradientRanks / 16; ++block) {
          auto& [upper, lower] = left[block];
          float sum[4] = {};
          mma_exact(sum, {upper[0], lower[0], upper[1], lower[1]}, {right[0], right[1]}, true);
          mma_exact(sum, {upper[2], lower[2], upper[3], lower[3]}, {right[2], right[3]}, true);
#pragma unroll
          for (int i = 0; i < 4; ++i) own[block][q][i] += sum[i];
        }
      }
    }
  }
  auto* sums = shared_memory<float>();  // [kWarps, 16, 65]
  constexpr int stride = kGradientColumns + 1;
  float scale = scaling ? scaling[adapter] : 1.f;
#pragma unroll
  for (int block = 0; block < kGradientRanks / 16; ++block) {
    __syncthreads();
#pragma unroll
    for (int q = 0; q < 8; ++q)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sums[(warp * 16 + g + i / 2 * 8) * stride + (2 * t + i % 2) * 8 + q] = own[block][q][i];
    __syncthreads();
    for (int i = threadIdx.x; i < 16 * kGradientColumns; i += kThreads) {
      // Neighbours in memory go to neighbouring threads.
      int row = gradient.rank_stride == 1 ? i % 16 : i / kGradientColumns;
      int f = gradient.rank_stride == 1 ? i / 16 : i % kGradientColumns;
      int j = first_rank + 16 * block + row;
      if (j >= routing.rank || column + f >= v.columns) continue;
      float sum = 0;
      for (int w = 0; w < kWarps; ++w) sum += sums[(w * 16 + row) * stride + f];
      sum = j < rank ? scale * sum : 0.f;
      int64_t of_adapters = int64_t(routing.rank) * v.columns;
      int64_t at = adapter * of_adapters + j * gradient.rank_stride + (column + f) * gradient.column_stride;
      if (gradient.planes) {
        gradient.planes[blockIdx.z * of_adapters * routing.adapters + at] = sum;
      } else {
        gradient.out[at] = Factor(sum);
      }
    }
  }
}

// out[a, j, f] = sum over h of planes[h, a, j, f] for used ranks of adapters with tokens, else 0.
template <class Factor>
__global__ void __launch_bounds__(kThreads)
    add_gradients_kernel(Gradient<Factor> gradient, Routing routing, int64_t of_adapter, int parts) {
  int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x, size = of_adapter * routing.adapters;
  if (i >= size) return;
  int64_t adapter = i / of_adapter, inside = i % of_adapter;
  int64_t j = gradient.rank_stride == 1 ? inside % routing.rank : inside / gradient.rank_stride;
  float sum = 0;
  if (j < routing.rank_of(adapter) && routing.begin(adapter) < routing.end(adapter))
    for (int h = 0; h < parts; ++h) sum += gradient.planes[h * size + i];
  gradient.out[i] = Factor(sum);
}

// --- grouping ---

// order[the number of tokens u with slots[u] < slots[t], or with slots[u] = slots[t] and u < t] = t;
// segments[a] = the number of tokens u with slots[u] < a.  slots, order: [T];  segments: [bounds]
__global__ void __launch_bounds__(kThreads)
    group_kernel(const int64_t* slots, int64_t* order, int64_t* segments, int tokens, int bounds) {
  auto* others = shared_memory<int64_t>();  // [kThreads]
  int i = blockIdx.x * kThreads + threadIdx.x;
  bool is_token = i < tokens;
  int64_t slot = is_token ? slots[i] : i - tokens;
  int before = 0;
  for (int begin = 0; begin < tokens; begin += kThreads) {
    __syncthreads();
    if (begin + threadIdx.x < tokens) others[threadIdx.x] = slots[begin + threadIdx.x];
    __syncthreads();
    int count = min(kThreads, tokens - begin);
    for (int u = 0; u < count; ++u) before += others[u] < slot || (is_token && others[u] == slot && begin + u < i);
  }
  if (is_token) {
    order[before] = i;
  } else if (i < tokens + bounds) {
    segments[i - tokens] = before;
  }
}

// --- launches ---

// Arguments of the ops, checked, and what all launches share. F is the type of the adapters.
template <class T, class F>
class Call {
 public:
  Call(const Tensor& first, const Tensor& lora_A, const Tensor& lora_B, const Tensor& scaling,
       const OptionalTensor& ranks, const Tensor& order, const Tensor& segments)
      : device_(first), like_(first) {
    int64_t adapters = lora_A.size(0), rank = lora_A.size(1), k = lora_A.size(2), n = lora_B.size(1);
    tokens = first.size(0);
    Dtype dtype = dtype_of(first, "x");
    Dtype factors = std::is_same_v<T, F> ? dtype : Dtype::f32;
    STD_TORCH_CHECK(dtype_of(lora_A, "lora_A") == factors && dtype_of(lora_B, "lora_B") == factors,
                    "adapters must be of the activations' dtype or float32");
    STD_TORCH_CHECK(adapters <= 65535 && std::max({k, n, tokens, rank}) < (int64_t(1) << 30),
                    "at most 65535 adapters, and sizes below 2^30");
    a = reinterpret_cast<const F*>(contiguous(lora_A, {adapters, rank, k}, "lora_A"));
    b = reinterpret_cast<const F*>(contiguous(lora_B, {adapters, n, rank}, "lora_B"));
    scales = sums<float>(scaling, {adapters}, "scaling");
    routing = {integers(order, tokens, "order"),
               integers(segments, adapters + 1, "segments"),
               ranks ? integers(*ranks, adapters, "ranks") : nullptr,
               static_cast<int>(adapters),
               static_cast<int>(rank),
               static_cast<int>(tokens)};
    in = k;
    out = n;
  }

  int64_t tokens, in, out;  // T, K, N
  const F *a, *b;
  const float* scales;
  Routing routing;

  Matrix<T> matrix(const Rows& rows, int64_t columns) const {
    return {reinterpret_cast<T*>(rows.data), rows.stride, static_cast<int>(columns)};
  }

  // At most as many tiles as any routing can need.
  int64_t most_tiles(int64_t size) const {
    return tokens / size + std::min<int64_t>(routing.adapters, tokens);
  }

  // Whether a block of decode_kernel may have the shared memory that it takes.
  bool fits_decode() const {
    return tokens <= kDecodeTokens && DecodeShared(most_tiles(kTile), routing.rank, 8).total <= shared_limit();
  }

  // Shrink and expand in one launch.
  void decode(const Rows& x, const Rows& y, float* s) const {
    int64_t rank = routing.rank, parts = ShrinkItems(routing.rank, in, 1).parts;
    OptionalTensor own;
    int* zeros = counters(like_, device_.stream(), own);
    Tensor planes = scratch(like_, {parts, tokens, rank}, ScalarType::Float);
    Branch<T, F> branch{constant(matrix(x, in)), a, b, scales, routing, matrix(y, out), s,
                     static_cast<float*>(planes.mutable_data_ptr())};
    int tiles = static_cast<int>(most_tiles(kTile));
    auto run = [&]<bool vector, int count>() {
      size_t shared = DecodeShared(tiles, routing.rank, count).total;
      int64_t items =
          tiles * std::max<int64_t>(ShrinkItems(routing.rank, in, count).of_tile(), (out + kColumns - 1) / kColumns);
      int64_t blocks = std::min(items, resident_blocks(decode_kernel<T, F, vector, count>, kThreads, shared));
      launch(decode_kernel<T, F, vector, count>, dim3(blocks), dim3(kThreads), shared, device_.stream(), branch, zeros,
             tiles);
    };
    bool factors = aligned(a, 16) && in % 8 == 0 && aligned(b, 4 * sizeof(F)) && rank % 4 == 0;
    with_count(in_runs(x, in) && in_runs(y, out) && factors, run);
  }

  // The branch as the tail of a product: its left operand [T, R rounded up to a multiple of 8], which `shrink` fills,
  // and the tokens that it serves.
  struct Tail {
    Tensor left, integers;
    const float* scaling;
    int *adapters, *whole, *rest;

    Whole served() const { return {whole, rest}; }
  };

  Tail tail(const float* scaling) const {
    Tensor integers = scratch(like_, {tokens + blocks() + 1}, ScalarType::Int);
    auto* adapters = static_cast<int*>(integers.mutable_data_ptr());
    Tail it{scratch(like_, {tokens, (routing.rank + 7) / 8 * 8}, like_.scalar_type()),
            integers, scaling, adapters, adapters + tokens, adapters + tokens + blocks()};
    launch(adapters_kernel, dim3((tokens + kThreads - 1) / kThreads), dim3(kThreads), 0, device_.stream(), routing,
           it.adapters, it.rest);
    return it;
  }

  // s[t, j] = scaling[a] * x[t] . factor[a, j], and the left operand of the tail, where there is one.
  // factor: [L, R, features];  s: [T, R]
  void shrink(const Rows& x, int64_t features, const F* factor, const float* scaling, float* s,
              const std::optional<Tail>& tail = {}) const {
    int64_t tiles = (tokens + kLongTile - 1) / kLongTile, wanted = std::max<int64_t>(1, kBlocks / 4 / tiles);
    int64_t part = std::max<int64_t>((features + wanted - 1) / wanted, kShrinkPart);
    part = (part + 31) / 32 * 32;
    int64_t parts = (features + part - 1) / part, size = tokens * routing.rank;
    OptionalTensor planes;
    if (parts > 1) planes = scratch(like_, {parts, size}, ScalarType::Float);
    float* to = planes ? static_cast<float*>(planes->mutable_data_ptr()) : s;
    auto run = [&]<bool vector, int count>() {
      int64_t rank_blocks = (routing.rank + 8 * count - 1) / (8 * count);
      launch(multi_shrink_kernel<T, F, vector, count>, dim3(most_tiles(kLongTile) * rank_blocks, parts), dim3(kThreads),
             kScan, device_.stream(), constant(matrix(x, features)), factor, scaling, routing, to, tokens, part);
    };
    with_count(in_runs(x, features) && aligned(factor, 16) && features % 8 == 0, run);
    if (tail)
      launch(tail_kernel<T>, dim3((tokens + kTile - 1) / kTile), dim3(kThreads), kScan, device_.stream(),
             tail->adapters, to, parts, tail->scaling, routing, s, static_cast<T*>(tail->left.mutable_data_ptr()),
             tail->left.size(1), tail->whole, tail->rest);
    else if (planes)
      launch(add_planes_kernel, dim3((size + kThreads - 1) / kThreads), dim3(kThreads), 0, device_.stream(), to, s,
             size, parts);
  }

  // Whether the product of gemm.h takes the base layer, from rows of x to the `columns` of y or from dy to those of dx,
  // and the branch of more tokens than go in one launch.
  bool fits_product(const Rows& from, const Rows& to, int64_t columns, const Tensor& weight) const {
    if (tokens <= kDecodeTokens || routing.adapters == 0 || routing.rank == 0 || routing.rank > kTailRank) return false;
    if (from.stride == 0) return false;  // no tensor map describes rows that are one and the same
    return weight.stride(1) == 1 && in_runs(rows_of(weight, out, in, "weight"), in) && in_runs(from, in) &&
           in_runs(to, out) && gemm_pays(tokens, columns);
  }

  // to = from weight^T + bias, or from weight where `backward`, and the branch of the tokens that the tail serves.
  // factor: lora_B [L, N, R], or lora_A [L, R, K]
  void product(bool backward, const Rows& from, const Tensor& weight, const OptionalTensor& bias, const Tail& tail,
               const F* factor, const Rows& to) const {
    int64_t depth = backward ? out : in, columns = backward ? in : out, rank = routing.rank;
    int64_t rows = backward ? rank : columns, width = backward ? columns : rank, stride = (width + 7) / 8 * 8;
    const void* right = factor;
    OptionalTensor copy;
    if (!std::is_same_v<T, F> || routing.ranks || stride != width || !aligned(factor, 16)) {
      copy = scratch(like_, {routing.adapters, rows, stride}, like_.scalar_type());
      right = copy->const_data_ptr();
      launch(tail_factor_kernel<T, F>, dim3((rows * stride + 4 * kThreads - 1) / (4 * kThreads), routing.adapters),
             dim3(kThreads), kScan, device_.stream(), factor, static_cast<T*>(copy->mutable_data_ptr()), rows, width,
             stride, backward, routing, tail.whole, blocks());
    }
    multiply({.bfloat16 = from.dtype == Dtype::bf16,
              .backward = backward,
              .rows = tokens,
              .columns = columns,
              .rank = rank,
              .products = {{depth, from.data, weight.const_data_ptr(), from.stride, weight.stride(0)}},
              .tail_left = tail.left.const_data_ptr(),
              .tail_right = right,
              .tail_left_stride = tail.left.size(1),
              .tail_right_stride = stride,
              .tail_of_block = tail.whole,
              .tails = routing.adapters,
              .tail_right_distance = rows * stride,
              .bias = bias ? bias->const_data_ptr() : nullptr,
              .out = to.data,
              .out_stride = to.stride},
             device_.stream());
  }

  // y[t] (+)= scaling[a] * s[t] factor[a]^T where the tail does not serve;  factor: [L, features, R];  y: [T, features]
  template <bool add>
  void expand(const float* s, const F* factor, const float* scaling, const Rows& y, int64_t features,
              const std::optional<Tail>& tail = {}) const {
    Whole whole = tail ? tail->served() : Whole{};
    auto run = [&](auto kernel) {
      launch(kernel, dim3(most_tiles(kLongTile), (features + kColumns - 1) / kColumns), dim3(kThreads),
             kScan + kLongTile * sizeof(int), device_.stream(), s, factor, scaling, routing, matrix(y, features),
             whole);
    };
    bool vector = in_runs(y, features) && aligned(factor, 4 * sizeof(F)) && routing.rank % 4 == 0;
    vector ? run(multi_expand_kernel<T, F, true, add>) : run(multi_expand_kernel<T, F, false, add>);
  }

  // gradient[a] = scaling[a] * the sum over tokens of s[t]^T v[t], [R, F], or its transpose, [F, R].
  void gradient(const Rows& v, int64_t columns, const float* s, const float* scaling, F* out, bool transposed) const {
    int64_t rank_blocks = (routing.rank + kGradientRanks - 1) / kGradientRanks;
    int64_t blocks = (columns + kGradientColumns - 1) / kGradientColumns * rank_blocks;
    int64_t active = std::min<int64_t>(routing.adapters, tokens),
            steps = (tokens + kWarps * kTile - 1) / (kWarps * kTile);
    int64_t parts = std::clamp<int64_t>(kBlocks / 2 / (blocks * active), 1, std::min<int64_t>(steps, 8));
    int64_t of_adapter = routing.rank * columns, size = of_adapter * routing.adapters;
    OptionalTensor planes;
    if (parts > 1) planes = scratch(like_, {parts, size}, ScalarType::Float);
    Gradient<F> to{out, planes ? static_cast<float*>(planes->mutable_data_ptr()) : nullptr, transposed ? 1 : columns,
                   transposed ? routing.rank : 1};
    auto run = [&](auto kernel) {
      launch(kernel, dim3(blocks, routing.adapters, parts), dim3(kThreads),
             kWarps * 16 * (kGradientColumns + 1) * sizeof(float), device_.stream(), constant(matrix(v, columns)), s,
             scaling, routing, to);
    };
    in_runs(v, columns) ? run(multi_gradient_kernel<T, F, true>) : run(multi_gradient_kernel<T, F, false>);
    if (planes)
      launch(add_gradients_kernel<F>, dim3((size + kThreads - 1) / kThreads), dim3(kThreads), 0, device_.stream(), to,
             routing, of_adapter, parts);
  }

  // factor [L, rows, columns] as [L, columns, rows], for adapters with tokens, if `needed` (null: yes).
  Tensor transposed(const F* factor, int64_t rows, int64_t columns, const int* needed = nullptr) const {
    auto dtype = std::is_same_v<T, F> ? like_.scalar_type() : ScalarType::Float;
    Tensor turned = scratch(like_, {routing.adapters, columns, rows}, dtype);
    int64_t blocks = ((rows + 31) / 32) * ((columns + 31) / 32);
    launch(transpose_kernel<F>, dim3(blocks, routing.adapters), dim3(kThreads), 32 * 33 * sizeof(F), device_.stream(),
           factor, static_cast<F*>(turned.mutable_data_ptr()), routing.segments, needed, rows, columns);
    return turned;
  }

  void zero_others(const Rows& rows, int64_t columns) const {
    launch(zero_kernel<T>, dim3(std::min<int64_t>(tokens, kBlocks)), dim3(kThreads), 0, device_.stream(),
           matrix(rows, columns), routing, tokens);
  }

  cudaStream_t stream() const { return device_.stream(); }

  Tensor shrunk() const { return scratch(like_, {tokens, routing.rank}, ScalarType::Float); }

 private:
  int blocks() const { return static_cast<int>((tokens + kTailBlock - 1) / kTailBlock); }

  static Matrix<const T> constant(const Matrix<T>& m) { return {m.data, m.stride, m.columns}; }
  static bool aligned(const void* pointer, uintptr_t bytes) {
    return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
  }

  // Calls run with how many times eight ranks a warp has at once; more than 32 float32 ones take too many registers.
  template <class Run>
  void with_count(bool vector, Run run) const {
    constexpr int most = std::is_same_v<T, F> ? 8 : 4;
    !vector              ? run.template operator()<false, 4>()
    : routing.rank <= 16 ? run.template operator()<true, 2>()
    : routing.rank <= 32 ? run.template operator()<true, 4>()
                         : run.template operator()<true, most>();
  }

  OnDevice device_;
  const Tensor& like_;
};

template <class T, class F>
void forward(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& lora_A,
             const Tensor& lora_B, const Tensor& scaling, const OptionalTensor& ranks, const Tensor& order,
             const Tensor& segments, Tensor& y, Tensor& s) {
  Call<T, F> call(x, lora_A, lora_B, scaling, ranks, order, segments);
  Rows in = rows_of(x, call.tokens, call.in, "x"), out = rows_of(y, call.tokens, call.out, "y");
  STD_TORCH_CHECK(out.dtype == in.dtype, "y must be of x's dtype");
  float* shrunk = sums<float>(s, {call.tokens, call.routing.rank}, "s");
  std::optional<typename Call<T, F>::Tail> tail;
  if (weight) {
    check_weight(*weight, call.out, call.in, in.dtype);
    if (bias) contiguous(*bias, {call.out}, "bias");
    STD_TORCH_CHECK(!bias || dtype_of(*bias, "bias") == in.dtype, "bias must be of the activations' dtype");
    FusedLayer layer{.x = x, .weight = *weight, .bias = bias, .lora_A = lora_A, .lora_B = lora_B, .scalings = scaling,
                     .ranks = ranks, .order = order, .segments = segments, .y = y, .s = s};
    if (takes(layer)) return fused_layer(layer, call.stream());
    if (call.fits_product(in, out, call.out, *weight)) {
      tail = call.tail(call.scales);
    } else {
      base_forward(x, *weight, bias, y);
    }
  }
  if (call.fits_decode()) return call.decode(in, out, shrunk);
  call.shrink(in, call.in, call.a, nullptr, shrunk, tail);
  if (tail) call.product(false, in, *weight, bias, *tail, call.b, out);
  call.template expand<true>(shrunk, call.b, call.scales, out, call.out, tail);
}

template <class T, class F>
void backward(const Tensor& dy, const OptionalTensor& x, const OptionalTensor& weight, const Tensor& lora_A,
              const Tensor& lora_B, const Tensor& scaling, const OptionalTensor& ranks, const Tensor& order,
              const Tensor& segments, const OptionalTensor& s, OptionalTensor& dx, const OptionalTensor& dlora_A,
              const OptionalTensor& dlora_B) {
  Call<T, F> call(dy, lora_A, lora_B, scaling, ranks, order, segments);
  int64_t adapters = call.routing.adapters, rank = call.routing.rank;
  STD_TORCH_CHECK(!dlora_A || x, "dlora_A needs x");
  STD_TORCH_CHECK(!dlora_B || s, "dlora_B needs s");
  Rows gradient = rows_of(dy, call.tokens, call.out, "dy"), in = rows_of(x, call.tokens, call.in, "x");
  Rows out = rows_of(dx, call.tokens, call.in, "dx");
  auto like = [](const OptionalTensor& t, const Tensor& other) { return !t || t->scalar_type() == other.scalar_type(); };
  STD_TORCH_CHECK(like(x, dy) && like(dx, dy) && like(dlora_A, lora_A) && like(dlora_B, lora_A),
                  "x and dx must be of dy's dtype, dlora_A and dlora_B of lora_A's");
  if (dlora_B) {
    auto* to = reinterpret_cast<F*>(contiguous(*dlora_B, {adapters, call.out, rank}, "dlora_B"));
    call.gradient(gradient, call.out, sums<float>(*s, {call.tokens, rank}, "s"), call.scales, to, true);
  }
  if (!dx && !dlora_A) return;
  std::optional<typename Call<T, F>::Tail> tail;
  if (dx && weight) {
    check_weight(*weight, call.out, call.in, gradient.dtype);
    if (call.fits_product(gradient, out, call.in, *weight)) tail = call.tail(nullptr);
  }
  Tensor ds = call.shrunk(), turned = call.transposed(call.b, call.out, rank);
  auto* shrunk = static_cast<float*>(ds.mutable_data_ptr());
  call.shrink(gradient, call.out, static_cast<const F*>(turned.const_data_ptr()), call.scales, shrunk, tail);
  if (dlora_A) {
    auto* to = reinterpret_cast<F*>(contiguous(*dlora_A, {adapters, rank, call.in}, "dlora_A"));
    call.gradient(in, call.in, shrunk, nullptr, to, false);
  }
  if (!dx) return;
  turned = call.transposed(call.a, rank, call.in, tail ? tail->rest : nullptr);
  auto* factor = static_cast<const F*>(turned.const_data_ptr());
  if (!weight) {
    call.zero_others(out, call.in);
    return call.template expand<false>(shrunk, factor, nullptr, out, call.in);
  }
  if (tail) {
    call.product(true, gradient, *weight, {}, *tail, call.a, out);
  } else {
    base_backward(dy, *weight, *dx);
  }
  call.template expand<true>(shrunk, factor, nullptr, out, call.in, tail);
}

// Calls f with elements of the 16-bit type of t and of the adapters' type, as decltype.
template <class F>
void with_types(const Tensor& t, const Tensor& lora_A, F f) {
  Dtype dtype = dtype_of(t, "x");
  STD_TORCH_CHECK(item_size(dtype) == 2, "multi-LoRA on CUDA takes bfloat16 and float16");
  bool exact = lora_A.scalar_type() == ScalarType::Float;
  if (dtype == Dtype::bf16) {
    exact ? f(__nv_bfloat16{}, float{}) : f(__nv_bfloat16{}, __nv_bfloat16{});
  } else {
    exact ? f(__half{}, float{}) : f(__half{}, __half{});
  }
}

void multi_lora_forward(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& lora_A,
                        const Tensor& lora_B, const Tensor& scaling, const OptionalTensor& ranks, const Tensor& order,
                        const Tensor& segments, Tensor& y, Tensor& s) {
  with_types(x, lora_A, [&]<class T, class F>(T, F) {
    forward<T, F>(x, weight, bias, lora_A, lora_B, scaling, ranks, order, segments, y, s);
  });
}

void multi_lora_backward(const Tensor& dy, const OptionalTensor& x, const OptionalTensor& weight, const Tensor& lora_A,
                         const Tensor& lora_B, const Tensor& scaling, const OptionalTensor& ranks, const Tensor& order,
                         const Tensor& segments, const OptionalTensor& s, OptionalTensor dx, OptionalTensor dlora_A,
                         OptionalTensor dlora_B) {
  with_types(dy, lora_A, [&]<class T, class F>(T, F) {
    backward<T, F>(dy, x, weight, lora_A, lora_B, scaling, ranks, order, segments, s, dx, dlora_A, dlora_B);
  });
}

void group_tokens(const Tensor& slots, Tensor& order, Tensor& segments) {
  OnDevice device(slots);
  int64_t tokens = slots.numel(), bounds = segments.numel();
  const int64_t* from = integers(slots, tokens, "slots");
  launch(group_kernel, dim3((tokens + bounds + kThreads - 1) / kThreads), dim3(kThreads), kThreads * sizeof(int64_t),
         device.stream(), from, integers(order, tokens, "order"), integers(segments, bounds, "segments"), tokens,
         bounds);
}

}  // namespace

}  // namespace pyfastpeft

STABLE_TORCH_LIBRARY_IMPL(pyfastpeft, CUDA, m) {
  m.impl("multi_lora_forward", TORCH_BOX(&pyfastpeft::multi_lora_forward));
  m.impl("multi_lora_backward", TORCH_BOX(&pyfastpeft::multi_lora_backward));
  m.impl("group_tokens", TORCH_BOX(&pyfastpeft::group_tokens));
}
