// LoRA on 16-bit CUDA tensors (reference.py has the formulas): two kernels that read an activation once, which is what
// they take their time for, small ones that finish, and the product of gemm.h, which takes the branch along as a tail;
// without it torch's, to which a kernel adds the branch, or which adds to the branch in dx, as always under dropout.
// Few tokens are left to decode.h.
//
// Where adapters are 16-bit, the tensor cores multiply 16-bit operands; where they are float32, see exact.h.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "ops/cuda/base.h"
#include "ops/cuda/decode.h"
#include "ops/cuda/dropout.h"
#include "ops/cuda/exact.h"
#include "ops/cuda/lora.h"
#include "ops/cuda/runtime.h"
#include "ops/lora_layers.h"

namespace pyfastpeft {

namespace {

constexpr int kThreads = 128;  // four warps
constexpr int kRows = 64;      // of a tile of an activation, 16 for every warp
constexpr int kPad = 16;       // elements after a row of a tile: four rows, 8 bytes for each of four lanes, in 32 banks
constexpr int kBlocks = 256;   // that a kernel aims at, whatever the device: results depend on shapes alone

constexpr int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// An activation [rows, columns] of 16-bit elements, columns a multiple of 8 and rows 16-byte aligned.
struct Activation16 {
  const void* data;
  int64_t stride, rows;
  int columns;
};

// --- tiles in shared memory ---

// How threads share the chunks of 16 bytes of a tile [kTileRows, C + kPad]: each has the same columns in some rows.
template <int kTileRows, int C, int kThreads, class T>
struct Chunks {
  static constexpr int kChunk = 16 / sizeof(T), kStep = kThreads / (C / kChunk);  // elements; rows to the next
  static constexpr int kCount = kTileRows / kStep;                                // of a thread
  static_assert(kThreads % (C / kChunk) == 0 && kTileRows % kStep == 0);

  int row = threadIdx.x / (C / kChunk), column = threadIdx.x % (C / kChunk) * kChunk;  // of the first

  __device__ T* at(T* tile, int i) const { return tile + (row + i * kStep) * (C + kPad) + column; }
};

// By asynchronous copies: tile[i, c] = matrix[row + i, column + c], 0 outside of it.  matrix: [rows, columns]
template <int kTileRows, int C, int kThreads, class T>
__device__ __forceinline__ void load_tile(T* tile, const T* matrix, int64_t stride, int64_t row, int64_t rows,
                                          int column, int columns) {
  Chunks<kTileRows, C, kThreads, T> chunks;
  int size = column + chunks.column < columns ? 16 : 0;
  const T* from = matrix + (row + chunks.row) * stride + column + chunks.column;  // not read where size is 0
  int left = static_cast<int>(min(int64_t(kTileRows), rows - row)) - chunks.row;
#pragma unroll
  for (int i = 0; i < chunks.kCount; ++i, from += chunks.kStep * stride)
    copy_async(chunks.at(tile, i), from, i * chunks.kStep < left ? size : 0);
}

// Zeroes what dropout drops of the eights that this thread itself has loaded with load_tile.
template <int kTileRows, int C, int kThreads, class T>
__device__ __forceinline__ void drop_tile(T* tile, const Dropout& dropout, uint64_t seed, int64_t row, int column) {
  Chunks<kTileRows, C, kThreads, T> chunks;
#pragma unroll 2
  for (int i = 0; i < chunks.kCount; ++i) {
    auto* at = reinterpret_cast<uint4*>(chunks.at(tile, i));
    uint32_t kept = kept_of_eight(dropout, seed, row + chunks.row + i * chunks.kStep, column + chunks.column);
    uint4 it = *at;
    *at = make_uint4(keep_of_two(it.x, kept), keep_of_two(it.y, kept >> 2), keep_of_two(it.z, kept >> 4),
                     keep_of_two(it.w, kept >> 6));
  }
}

// --- products of tiles. The order of the terms of a sum is free: a thread takes four neighbours where the tensor cores
// --- want two and two.

// s[n] += activation[row, :] . factor[8 n + .., :] over kColumns columns from where the two pointers into tiles C wide
// point, for the warp's 16 rows: lane 4 g + t holds rows g (s[n][0], s[n][1]) and g + 8, ranks 8 n + 2 t and the next.
template <int R, int kColumns, int C, class T, class Factor>
__device__ __forceinline__ void shrink_tile(float (&s)[R / 8][4], const T* activation, const Factor* factor) {
  int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const T* top = activation + g * (C + kPad) + 4 * t;
  const T* bottom = top + 8 * (C + kPad);
  factor += g * (C + kPad) + 4 * t;
  if constexpr (std::is_same_v<T, Factor>) {
#pragma unroll
    for (int k = 0; k < kColumns; k += 16) {
      uint2 upper = *reinterpret_cast<const uint2*>(top + k), lower = *reinterpret_cast<const uint2*>(bottom + k);
      uint32_t a[4] = {upper.x, lower.x, upper.y, lower.y};
#pragma unroll
      for (int n = 0; n < R / 8; ++n) {
        uint2 four = *reinterpret_cast<const uint2*>(factor + 8 * n * (C + kPad) + k);
        uint32_t b[2] = {four.x, four.y};
        mma<T>(s[n], a, b);
      }
    }
  } else {
    for (int k64 = 0; k64 < kColumns; k64 += 64) {
      float sum[R / 8][4] = {};
#pragma unroll
      for (int k = k64; k < k64 + 64; k += 16) {
        uint2 upper = *reinterpret_cast<const uint2*>(top + k), lower = *reinterpret_cast<const uint2*>(bottom + k);
        float2 upper01 = unpack<T>(upper.x), upper23 = unpack<T>(upper.y);
        float2 lower01 = unpack<T>(lower.x), lower23 = unpack<T>(lower.y);
        float first[4] = {upper01.x, lower01.x, upper01.y, lower01.y};
        float second[4] = {upper23.x, lower23.x, upper23.y, lower23.y};
#pragma unroll
        for (int n = 0; n < R / 8; ++n) {
          float4 four = *reinterpret_cast<const float4*>(factor + 8 * n * (C + kPad) + k);
          mma_exact(sum[n], first, {four.x, four.y}, false);
          mma_exact(sum[n], second, {four.z, four.w}, false);
        }
      }
#pragma unroll
      for (int n = 0; n < R / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[n][i] += sum[n][i];
    }
  }
}

// gradient[j][i] += factor[:, 16 j + ..]^T activation[:, 4 .. + i] over the 64 rows of the two tiles, for 32 columns of
// the activation from `activation` on: lane 4 g + t holds ranks g (gradient[j][i][0], [1]) and g + 8 of columns 8 t + i
// and 8 t + 4 + i.  activation: [64, C + kPad];  factor: [64, R + 8] float32
template <bool exact, int R, int C, class T>
__device__ __forceinline__ void gradient_tile(float (&gradient)[R / 16][4][4], const T* activation, const float* factor) {
  int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  activation += t * (C + kPad) + 4 * g;
  factor += t * (R + 8) + g;
#pragma unroll
  for (int j = 0; j < R / 16; ++j) {
    float sum[4][4] = {};
#pragma unroll
    for (int m = 0; m < kRows; m += 16) {
      uint2 rows[4];  // m + t, m + t + 4, .. of the activation, four columns each
      float left[4][2];  // the same rows of the factor, two ranks each
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        rows[q] = *reinterpret_cast<const uint2*>(activation + (m + 4 * q) * (C + kPad));
        left[q][0] = factor[(m + 4 * q) * (R + 8) + 16 * j];
        left[q][1] = factor[(m + 4 * q) * (R + 8) + 16 * j + 8];
      }
      if constexpr (exact) {
#pragma unroll
        for (int q = 0; q < 4; q += 2) {
          float a[4] = {left[q][0], left[q][1], left[q + 1][0], left[q + 1][1]};
          float2 near01 = unpack<T>(rows[q].x), near23 = unpack<T>(rows[q].y);
          float2 far01 = unpack<T>(rows[q + 1].x), far23 = unpack<T>(rows[q + 1].y);
          mma_exact(sum[0], a, {near01.x, far01.x}, true);
          mma_exact(sum[1], a, {near01.y, far01.y}, true);
          mma_exact(sum[2], a, {near23.x, far23.x}, true);
          mma_exact(sum[3], a, {near23.y, far23.y}, true);
        }
      } else {
        uint32_t a[4] = {pack<T>(left[0][0], left[1][0]), pack<T>(left[0][1], left[1][1]),
                         pack<T>(left[2][0], left[3][0]), pack<T>(left[2][1], left[3][1])};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          uint32_t pair[4];
#pragma unroll
          for (int q = 0; q < 4; ++q) pair[q] = i < 2 ? rows[q].x : rows[q].y;
          uint32_t b[2];
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            uint32_t near = pair[2 * h], far = pair[2 * h + 1];
            b[h] = i % 2 ? near >> 16 | (far & 0xffff0000u) : (near & 0xffffu) | far << 16;
          }
          mma<T>(sum[i], a, b);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int q = 0; q < 4; ++q) gradient[j][i][q] += sum[i][q];
  }
}

// What becomes of sums over a part of the columns: s[part, m, j] = scale * sum and, unless null,
// rounded[m, j] = T(rounded_scale * s[part, m, j]), with zeros from rank on.
struct Shrunk {
  float* s = nullptr;       // [parts, rows, rank], or, of one part, [rows, rank] at a stride
  void* rounded = nullptr;  // [rows, rounded_stride]
  int rank = 0, stride = 0, rounded_stride = 0;  // rounded_stride: rank, rounded up to a multiple of 8
  float scale = 1.0f, rounded_scale = 1.0f;
};

// The warp's 16 rows of a tile: s of shrink_tile, ranks from first_rank on.
template <int R, class T>
__device__ __forceinline__ void store_shrunk(const float (&s)[R / 8][4], const Shrunk& out, int64_t part, int64_t row,
                                             int64_t rows, int first_rank) {
  int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  row += threadIdx.x / 32 * 16 + g;
#pragma unroll
  for (int half = 0; half < 2; ++half, row += 8) {
    if (row >= rows) continue;
#pragma unroll
    for (int n = 0; n < R / 8; ++n) {
      int rank = first_rank + 8 * n + 2 * t;
      float x = s[n][2 * half] * out.scale, y = s[n][2 * half + 1] * out.scale;
      float* to = out.s + (part * rows + row) * out.stride + rank;
      if (rank < out.rank) to[0] = x;
      if (rank + 1 < out.rank) to[1] = y;
      if (out.rounded && rank < out.rounded_stride) {
        auto* rounded = static_cast<T*>(out.rounded) + row * out.rounded_stride + rank;
        *reinterpret_cast<uint32_t*>(rounded) = pack<T>(x * out.rounded_scale, y * out.rounded_scale);
      }
    }
  }
}

// --- kernels over an activation ---

// Eight warps, two for the same rows, with half of a tile's columns each: four alone would not hide what they wait for.
template <int R, class T, class Factor>
struct ShrinkShape {
  static constexpr int kThreads = 256, kColumns = 128, kStage = (kRows * sizeof(T) + R * sizeof(Factor)) * (kColumns + kPad);
};

// s[part, m, j] = sum over the columns k of a part of drop(x)[m, k] factor[j, k].
// Grid: tiles of 64 rows, parts of the columns, chunks of R ranks.  factor: [rank, columns] without gaps
template <int R, int kStages, class T, class Factor>
__global__ void __launch_bounds__(ShrinkShape<R, T, Factor>::kThreads)
    shrink_kernel(Activation16 x, const Factor* factor, Dropout dropout, Shrunk out, int tiles_per_part) {
  using Shape = ShrinkShape<R, T, Factor>;
  static_assert(kStages > 1);
  constexpr int C = Shape::kColumns, kThreads = Shape::kThreads;
  auto* memory = shared_memory<unsigned char>();
  auto* data = static_cast<const T*>(x.data);
  int64_t row = int64_t(blockIdx.x) * kRows;
  int first_rank = blockIdx.z * R, ranks = min(R, out.rank - first_rank);
  int begin = blockIdx.y * tiles_per_part;
  int tiles = min(tiles_per_part, static_cast<int>(div_up(x.columns, C)) - begin);
  uint64_t seed = dropout.seed ? *dropout.seed : 0;
  auto activation = [&](int tile) { return reinterpret_cast<T*>(memory + tile % kStages * Shape::kStage); };
  auto load = [&](int tile) {
    if (tile < tiles) {
      int column = (begin + tile) * C;
      T* at = activation(tile);
      load_tile<kRows, C, kThreads>(at, data, x.stride, row, x.rows, column, x.columns);
      load_tile<R, C, kThreads>(reinterpret_cast<Factor*>(at + kRows * (C + kPad)),
                                factor + int64_t(first_rank) * x.columns, x.columns, 0, ranks, column, x.columns);
    }
    commit_async();
  };
  for (int tile = 0; tile < kStages - 1; ++tile) load(tile);
  float s[R / 8][4] = {};
  int half = threadIdx.x / (kThreads / 2), own_row = threadIdx.x / 32 % 4 * 16, own_column = half * (C / 2);
  for (int tile = 0; tile < tiles; ++tile) {
    T* at = activation(tile);
    wait_async<kStages - 2>();
    if (dropout.seed) drop_tile<kRows, C, kThreads>(at, dropout, seed, row, (begin + tile) * C);
    __syncthreads();  // this tile is there, and nobody reads the one before, whose place the next takes
    load(tile + kStages - 1);
    shrink_tile<R, C / 2, C>(s, at + own_row * (C + kPad) + own_column,
                             reinterpret_cast<const Factor*>(at + kRows * (C + kPad)) + own_column);
  }
  wait_async<0>();
  __syncthreads();
  auto* others = reinterpret_cast<float*>(memory) + threadIdx.x % (kThreads / 2);
#pragma unroll
  for (int i = 0; half && i < R / 2; ++i) others[i * (kThreads / 2)] = s[i / 4][i % 4];
  __syncthreads();
  if (half) return;
#pragma unroll
  for (int i = 0; i < R / 2; ++i) s[i / 4][i % 4] += others[i * (kThreads / 2)];
  store_shrunk<R, T>(s, out, blockIdx.y, row, x.rows, first_rank);
}

template <int R, class T, class Factor>
struct GradientShape {
  static constexpr int kColumns = R > 16 ? 128 : 256;
  static constexpr int kActivation = kRows * (kColumns + kPad) * sizeof(T), kStage = kActivation + kRows * (R + 8) * 4;
  // Ranks up to which one pass over dy [M, N] for ds and dlora_B moves no more than two: the parts of ds that it writes
  // and reads, one for every block of columns, weigh no more than dy.
  static constexpr int kOnePass = std::min<int>(R, kColumns * sizeof(T) / (2 * sizeof(float)));
  static constexpr int kStages = 2, kFactor = kOnePass * (kColumns + kPad) * sizeof(Factor);
  static constexpr int kShared = kStages * kStage + kFactor;
};

// By asynchronous copies: to[i, j] = left[row + i, first_rank + j] for j < ranks, 0 outside of left.
// to: [kRows, R + 8];  left: [rows, ..] at a stride
template <int R>
__device__ __forceinline__ void load_left(float* to, const float* left, int64_t stride, int64_t row, int64_t rows,
                                          int first_rank, int ranks) {
  if ((reinterpret_cast<uintptr_t>(left) | stride * sizeof(float)) % 16) {
    for (int i = threadIdx.x; i < kRows * R; i += kThreads) {
      int m = i / R, j = i % R;
      bool inside = row + m < rows && j < ranks;
      copy_async_word(to + m * (R + 8) + j, inside ? left + (row + m) * stride + first_rank + j : left, inside);
    }
    return;
  }
  constexpr int kStep = kThreads / (R / 4);
  int first = threadIdx.x / (R / 4), j = threadIdx.x % (R / 4) * 4, size = max(0, min(16, (ranks - j) * 4));
  const float* from = left + (row + first) * stride + first_rank + j;  // not read where size is 0
#pragma unroll
  for (int m = 0; m < kRows; m += kStep, from += kStep * stride)
    copy_async(to + (first + m) * (R + 8) + j, from, row + first + m < rows ? size : 0);
}

// gradient[part, j, c] = sum over the rows m of a part of left[m, j] drop(x)[m, c]; and, where factor is given,
// s[block, m, j] = sum over the columns c of a block of drop(x)[m, c] factor[c, j], for up to kOnePass ranks.
// Grid: blocks of kColumns columns, parts of the rows, chunks of R ranks.
// left: [rows, rank] at a stride;  factor: [columns, rank] without gaps;  gradient: [parts, rank, columns] without gaps
template <int R, class T, class Factor>
__global__ void __launch_bounds__(kThreads, 2)  // no more have the shared memory
    gradient_kernel(Activation16 x, const float* left, int64_t left_stride, const Factor* factor, Dropout dropout,
                    Shrunk out, float* gradient, int tiles_per_part) {
  using Shape = GradientShape<R, T, Factor>;
  constexpr int C = Shape::kColumns, kGroups = C / 128, kOnePass = Shape::kOnePass;
  auto* memory = shared_memory<unsigned char>();
  auto* data = static_cast<const T*>(x.data);
  int column = blockIdx.x * C, first_rank = blockIdx.z * R, ranks = min(R, out.rank - first_rank);
  int64_t begin = int64_t(blockIdx.y) * tiles_per_part;
  int tiles = static_cast<int>(min(int64_t(tiles_per_part), div_up(x.rows, kRows) - begin));
  uint64_t seed = dropout.seed ? *dropout.seed : 0;
  auto activation = [&](int tile) { return reinterpret_cast<T*>(memory + tile % Shape::kStages * Shape::kStage); };
  auto load = [&](int tile) {
    if (tile < tiles) {
      int64_t row = (begin + tile) * kRows;
      T* at = activation(tile);
      load_tile<kRows, C, kThreads>(at, data, x.stride, row, x.rows, column, x.columns);
      load_left<R>(reinterpret_cast<float*>(at + kRows * (C + kPad)), left, left_stride, row, x.rows, first_rank, ranks);
    }
    commit_async();
  };
  for (int tile = 0; tile < Shape::kStages - 1; ++tile) load(tile);
  auto* factor_tile = reinterpret_cast<Factor*>(memory + Shape::kStages * Shape::kStage);  // [kOnePass, C + kPad]
  if (factor) {
    for (int i = threadIdx.x; i < kOnePass * C; i += kThreads) {
      int j = i % kOnePass, c = i / kOnePass;
      bool inside = j < ranks && column + c < x.columns;
      factor_tile[j * (C + kPad) + c] = inside ? factor[int64_t(column + c) * out.rank + first_rank + j] : Factor(0.0f);
    }
  }
  int own = threadIdx.x / 32 * 32 * kGroups;  // the columns of this warp
  float sums[kGroups][R / 16][4][4] = {};
  for (int tile = 0; tile < tiles; ++tile) {
    int64_t row = (begin + tile) * kRows;
    T* at = activation(tile);
    wait_async<Shape::kStages - 2>();
    if (dropout.seed) drop_tile<kRows, C, kThreads>(at, dropout, seed, row, column);
    __syncthreads();  // this tile is there, and nobody reads the one before, whose place the next takes
    load(tile + Shape::kStages - 1);
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      gradient_tile<!std::is_same_v<T, Factor>, R, C>(sums[group], at + own + 32 * group,
                                                      reinterpret_cast<const float*>(at + kRows * (C + kPad)));
    }
    if (factor) {
      float s[kOnePass / 8][4] = {};
      shrink_tile<kOnePass, C, C>(s, at + threadIdx.x / 32 * 16 * (C + kPad), factor_tile);
      store_shrunk<kOnePass, T>(s, out, blockIdx.x, row, x.rows, first_rank);
    }
  }
  int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    int c = column + own + 32 * group + 8 * t;
    if (c >= x.columns) continue;
#pragma unroll
    for (int j = 0; j < R / 16; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int rank = 16 * j + 8 * half + g;
        if (rank >= ranks) continue;
        auto& d = sums[group][j];
        auto* to = reinterpret_cast<float4*>(
            gradient + (int64_t(blockIdx.y) * out.rank + first_rank + rank) * x.columns + c);
        to[0] = make_float4(d[0][2 * half], d[1][2 * half], d[2][2 * half], d[3][2 * half]);
        to[1] = make_float4(d[0][2 * half + 1], d[1][2 * half + 1], d[2][2 * half + 1], d[3][2 * half + 1]);
      }
    }
  }
}

// y[m, c] (+)= drop(sum over j of left[m, j] factor(j, c)), left and factor rounded to T: the branch alone.
// Grid: blocks of C columns, rows dealt out by tiles.  left: [rows, left_stride], 0 from rank on;
// factor: element (j, c) at j * by_rank + c * by_column, one of the two 1;  y: columns a multiple of 8
template <class T, class Factor, int C>
__global__ void __launch_bounds__(kThreads) expand_kernel(T* y, int64_t y_stride, int64_t rows, int columns, const T* left,
                                                          int left_stride, const Factor* factor, int64_t by_rank,
                                                          int64_t by_column, int rank, Dropout dropout, bool add) {
  auto* tile = shared_memory<T>();  // [C, pitch]: an odd number of words apart
  int depth = static_cast<int>(div_up(rank, 16)) * 16, pitch = depth + 10, column = blockIdx.x * C;
  for (int i = threadIdx.x; i < C * depth; i += kThreads) {
    int j = by_rank == 1 ? i % depth : i / C, c = by_rank == 1 ? i / depth : i % C;
    bool inside = j < rank && column + c < columns;
    tile[c * pitch + j] = inside ? T(float(factor[j * by_rank + (column + c) * by_column])) : T(0.0f);
  }
  __syncthreads();
  uint64_t seed = dropout.seed ? *dropout.seed : 0;
  int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  // Lane 4 g + t is to hold the columns 8 t .. of every 32, as they lie in memory.
  const T* right = tile + ((g / 2) * 8 + g % 2) * pitch + 2 * t;
  for (int64_t first = int64_t(blockIdx.y) * kRows; first < rows; first += int64_t(gridDim.y) * kRows) {
    int64_t row = first + threadIdx.x / 32 * 16 + g;
    auto at = [&](int half, int group) {
      return reinterpret_cast<uint4*>(y + (row + 8 * half) * y_stride + column + 32 * group + 8 * t);
    };
    auto inside = [&](int half, int group) { return row + 8 * half < rows && column + 32 * group + 8 * t < columns; };
    uint4 before[2][C / 32] = {};  // all asked for at once
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int group = 0; group < C / 32; ++group)
        if (add && inside(half, group)) before[half][group] = *at(half, group);
    float sums[C / 32][4][4] = {};
    for (int j = 0; j < depth; j += 16) {
      uint32_t a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int64_t m = row + i % 2 * 8;
        int rank8 = j + i / 2 * 8;
        bool there = m < rows && rank8 < left_stride;
        a[i] = there ? *reinterpret_cast<const uint32_t*>(left + m * left_stride + rank8 + 2 * t) : 0;
      }
#pragma unroll
      for (int group = 0; group < C / 32; ++group) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const T* two = right + (32 * group + 2 * i) * pitch + j;
          uint32_t b[2] = {*reinterpret_cast<const uint32_t*>(two), *reinterpret_cast<const uint32_t*>(two + 8)};
          mma<T>(sums[group][i], a, b);
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int group = 0; group < C / 32; ++group) {
        if (!inside(half, group)) continue;
        int c = column + 32 * group + 8 * t;
        uint32_t kept = dropout.seed ? kept_of_eight(dropout, seed, row + 8 * half, c) : 0xffu;
        uint4 old16 = before[half][group];
        uint32_t words[4] = {old16.x, old16.y, old16.z, old16.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float2 old = unpack<T>(words[i]);
          float x0 = kept >> (2 * i) & 1 ? sums[group][i][2 * half] * dropout.keep : 0.0f;
          float x1 = kept >> (2 * i + 1) & 1 ? sums[group][i][2 * half + 1] * dropout.keep : 0.0f;
          words[i] = pack<T>(old.x + x0, old.y + x1);
        }
        *at(half, group) = make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
  }
}

// --- kernels that finish ---

constexpr int kFinishThreads = 256;

// out.s[m, j] = scale * sum over the parts of sums[part, m, j];  rounded[m, j] = T(rounded_scale * out.s[m, j]), with
// zeros from rank on.  One thread an element of rounded, or, where it is null, of out.s.
template <class T>
__global__ void __launch_bounds__(kFinishThreads) sum_shrunk_kernel(const float* sums, int parts, int64_t rows,
                                                                    Shrunk out) {
  int columns = out.rounded ? out.rounded_stride : out.rank;
  int64_t i = int64_t(blockIdx.x) * kFinishThreads + threadIdx.x, m = i / columns;
  int j = static_cast<int>(i % columns);
  if (m >= rows) return;
  float sum = 0.0f;
  if (j < out.rank) {
#pragma unroll 4
    for (int part = 0; part < parts; ++part) sum += sums[(part * rows + m) * out.rank + j];
    sum *= out.scale;
    out.s[m * out.stride + j] = sum;
  }
  if (out.rounded) static_cast<T*>(out.rounded)[i] = T(sum * out.rounded_scale);
}

// A gradient of a factor [rank, columns] from its parts.
struct FactorGradient {
  const float* sums = nullptr;  // [parts, rank, columns]
  int parts = 0, rank = 0, columns = 0;
  float scale = 1.0f;
  const float* column_scale = nullptr;  // [columns], or null: 1
  void* out = nullptr;  // [rank, columns], or [columns, rank] if transposed, without gaps
  bool transposed = false;
};

// out[j, c] = scale * column_scale[c] * sum over parts of sums[part, j, c], for one factor in every blockIdx.y. A thread takes four columns.
template <class Factor>
__global__ void __launch_bounds__(kFinishThreads) sum_gradient_kernel(FactorGradient first, FactorGradient second) {
  FactorGradient it = first;
  if (blockIdx.y) it = second;
  int64_t size = int64_t(it.rank) * it.columns, i = (int64_t(blockIdx.x) * kFinishThreads + threadIdx.x) * 4;
  if (i >= size) return;
  float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 4
  for (int part = 0; part < it.parts; ++part) {
    float4 some = *reinterpret_cast<const float4*>(it.sums + part * size + i);
    sum = make_float4(sum.x + some.x, sum.y + some.y, sum.z + some.z, sum.w + some.w);
  }
  if (it.column_scale) {
    float4 by = *reinterpret_cast<const float4*>(it.column_scale + i % it.columns);
    sum = make_float4(sum.x * by.x, sum.y * by.y, sum.z * by.z, sum.w * by.w);
  }
  auto* out = static_cast<Factor*>(it.out) + (it.transposed ? i % it.columns * it.rank + i / it.columns : i);
  int64_t step = it.transposed ? it.rank : 1;
  out[0] = Factor(sum.x * it.scale);
  out[step] = Factor(sum.y * it.scale);
  out[2 * step] = Factor(sum.z * it.scale);
  out[3 * step] = Factor(sum.w * it.scale);
}

// out[i, j] = scale * row_scale[i] * in(i, j), element (i, j) at i * by_row + j * by_column; row_scale may be null: 1.
// One thread an element of out [rows, out_stride], which holds zeros from `columns` on.
template <class Out, class In>
__global__ void __launch_bounds__(kFinishThreads)
    copy_kernel(const In* in, int64_t by_row, int64_t by_column, int64_t rows, int columns, Out* out, int out_stride,
                float scale, const float* row_scale) {
  int64_t at = int64_t(blockIdx.x) * kFinishThreads + threadIdx.x, i = at / out_stride;
  int j = static_cast<int>(at % out_stride);
  if (i >= rows) return;
  if (row_scale) scale *= row_scale[i];
  out[at] = j < columns ? Out(scale * float(in[i * by_row + j * by_column])) : Out(0.0f);
}

// --- on the host ---

template <class T_, class Factor_>
struct Types {
  using T = T_;            // of the activations
  using Factor = Factor_;  // of the adapters
  static constexpr auto dtype = std::is_same_v<T, __half> ? ScalarType::Half : ScalarType::BFloat16;
  static constexpr auto factor_dtype = std::is_same_v<T, Factor> ? dtype : ScalarType::Float;
};

// run(Types<..>) for the dtypes of an activation and of the adapters.
template <class Run>
void with_types(const Tensor& x, const Tensor& lora_A, const Tensor& lora_B, Run run) {
  auto adapters = lora_A.scalar_type();
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half,
                  "activations must be bfloat16 or float16");
  STD_TORCH_CHECK(lora_B.scalar_type() == adapters && (adapters == x.scalar_type() || adapters == ScalarType::Float),
                  "adapters must be of the activations' dtype or float32");
  bool exact = adapters == ScalarType::Float;
  if (x.scalar_type() == ScalarType::Half) {
    exact ? run(Types<__half, float>{}) : run(Types<__half, __half>{});
  } else {
    exact ? run(Types<__nv_bfloat16, float>{}) : run(Types<__nv_bfloat16, __nv_bfloat16>{});
  }
}

// run(R): 16 or 64 ranks at a time.
template <class Run>
void with_ranks(int rank, Run run) {
  rank <= 16 ? run(std::integral_constant<int, 16>{}) : run(std::integral_constant<int, 64>{});
}

template <class T>
T* pointer(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

int round_up(int64_t rank) { return static_cast<int>(div_up(rank, 8)) * 8; }

bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// t [rows, columns], whose rows may be read 16 bytes at a time.
Rows aligned_rows(const Tensor& t, int64_t rows, int64_t columns, const char* name) {
  Rows it = rows_of(t, rows, columns, name);
  STD_TORCH_CHECK(aligned(it.data) && it.stride % 8 == 0 && columns % 8 == 0, name,
                  " must have rows that begin at multiples of 16 bytes and are a multiple of 8 long");
  return it;
}

Activation16 activation(const Tensor& t, int64_t rows, int columns, const char* name) {
  Rows it = aligned_rows(t, rows, columns, name);
  return {it.data, it.stride, rows, columns};
}

Dropout dropout_of(const OptionalTensor& seed, double p) {
  if (!seed) return {};
  return {integers(*seed, 1, "seed"), static_cast<uint32_t>(p * 4294967296.0), static_cast<float>(1.0 / (1.0 - p))};
}

// An op's stream and where its scratch memory comes from.
struct Place {
  const Tensor& beside;
  cudaStream_t stream;
};

template <class Out, class In>
void copy(const Place& place, const In* in, int64_t by_row, int64_t by_column, int64_t rows, int columns, Out* out,
          int out_stride, double scale = 1, const float* row_scale = nullptr) {
  launch(copy_kernel<Out, In>, dim3(div_up(rows * out_stride, kFinishThreads)), dim3(kFinishThreads), 0, place.stream,
         in, by_row, by_column, rows, columns, out, out_stride, scale, row_scale);
}

// t [rows, columns], float32 at a stride, in T, times scale, with zeros behind up to a multiple of 8.
template <class Type>
Tensor rounded(const Place& place, const float* t, int64_t stride, int64_t rows, int64_t columns, double scale) {
  Tensor result = scratch(place.beside, {rows, round_up(columns)}, Type::dtype);
  copy(place, t, stride, 1, rows, columns, pointer<typename Type::T>(result), result.size(1), scale);
  return result;
}

template <class T>
void sum_shrunk(const Place& place, const Tensor& sums, const Shrunk& out) {
  int64_t parts = sums.size(0), rows = sums.size(1);
  int64_t columns = out.rounded ? out.rounded_stride : out.rank;
  launch(sum_shrunk_kernel<T>, dim3(div_up(rows * columns, kFinishThreads)), dim3(kFinishThreads), 0, place.stream,
         pointer<float>(sums), parts, rows, out);
}

// out of drop(x) factor^T.  factor: [rank, columns of x] without gaps, 16-byte aligned
template <class Type>
void shrink(const Place& place, const Activation16& x, const typename Type::Factor* factor, const Dropout& dropout,
            const Shrunk& out) {
  using T = typename Type::T;
  with_ranks(out.rank, [&](auto ranks) {
    using Shape = ShrinkShape<ranks, T, typename Type::Factor>;
    int64_t blocks = div_up(x.rows, kRows), chunks = div_up(out.rank, ranks), tiles = div_up(x.columns, Shape::kColumns);
    // From 128 blocks on, parts would cost more than they spread.
    int64_t wanted = blocks * chunks >= kBlocks / 2 ? 1 : div_up(kBlocks, blocks * chunks);
    int64_t tiles_per_part = div_up(tiles, std::min(wanted, tiles)), parts = div_up(tiles, tiles_per_part);
    Tensor sums = scratch(place.beside, {parts > 1 ? parts : 0, x.rows, out.rank}, ScalarType::Float);
    Shrunk part = out;
    if (parts > 1) part = {.s = pointer<float>(sums), .rank = out.rank, .stride = out.rank};
    auto run = [&]<int R, int bytes>() {
      constexpr int kStage = ShrinkShape<R, T, typename Type::Factor>::kStage, kStages = std::min(4, bytes / kStage);
      launch(shrink_kernel<R, kStages, T, typename Type::Factor>, dim3(blocks, parts, div_up(out.rank, R)),
             dim3(Shape::kThreads), kStages * kStage, place.stream, x, factor, dropout, part, tiles_per_part);
    };
    constexpr int kBytes = 112 * 1024;  // or what there is, where two stages of 64 float32 ranks do not fit
    constexpr int kFew = std::min<int>(ranks, sizeof(typename Type::Factor) == 4 ? 32 : 64);
    shared_limit() < kBytes ? run.template operator()<kFew, kLeastShared>() : run.template operator()<ranks, kBytes>();
    if (parts > 1) sum_shrunk<T>(place, sums, out);
  });
}

// The parts of left^T drop(x) and, with factor, out of drop(x) factor, which reads x once for both.
// left: [rows, rank] at a stride;  factor: [columns of x, rank] without gaps.  Result: [parts, rank, columns]
template <class Type>
Tensor gradient(const Place& place, const Activation16& x, const float* left, int64_t left_stride,
                const typename Type::Factor* factor, const Dropout& dropout, const Shrunk& out) {
  using T = typename Type::T;
  Tensor result;
  with_ranks(out.rank, [&](auto ranks) {
    using Shape = GradientShape<ranks, T, typename Type::Factor>;
    int64_t blocks = div_up(x.columns, Shape::kColumns), chunks = div_up(out.rank, ranks), tiles = div_up(x.rows, kRows);
    int64_t tiles_per_part = div_up(tiles, std::min(div_up(kBlocks, blocks * chunks), tiles));
    int64_t parts = div_up(tiles, tiles_per_part);
    result = scratch(place.beside, {parts, out.rank, x.columns}, ScalarType::Float);
    Tensor sums = scratch(place.beside, {factor ? blocks : 0, x.rows, out.rank}, ScalarType::Float);
    launch(gradient_kernel<ranks, T, typename Type::Factor>, dim3(blocks, parts, chunks), dim3(kThreads), Shape::kShared,
           place.stream, x, left, left_stride, factor, dropout,
           Shrunk{.s = pointer<float>(sums), .rank = out.rank, .stride = out.rank}, pointer<float>(result),
           tiles_per_part);
    if (factor) sum_shrunk<T>(place, sums, out);
  });
  return result;
}

template <class Type>
bool worth_one_pass(int rank) {
  bool worth = false;
  with_ranks(rank, [&](auto ranks) {
    worth = rank <= GradientShape<ranks, typename Type::T, typename Type::Factor>::kOnePass;
  });
  return worth;
}

// y (+)= drop(left factor), in place.  left: [M, round_up(rank)] of T;  factor: of the strides of expand_kernel
template <class Type>
void expand(const Place& place, const Activation16& y, const Tensor& left, const typename Type::Factor* factor,
            int64_t by_rank, int64_t by_column, int rank, const Dropout& dropout, bool add) {
  using T = typename Type::T;
  size_t of_column = (div_up(rank, 16) * 16 + 10) * sizeof(T);  // bytes of shared memory
  auto run = [&]<int C>() {
    int64_t blocks = div_up(y.columns, C), tiles = div_up(y.rows, kRows);
    int64_t parts = std::min<int64_t>(tiles, div_up(8 * kBlocks, blocks));
    launch(expand_kernel<T, typename Type::Factor, C>, dim3(blocks, parts), dim3(kThreads), C * of_column, place.stream,
           static_cast<T*>(const_cast<void*>(y.data)), y.stride, y.rows, y.columns, pointer<T>(left), left.size(1),
           factor, by_rank, by_column, rank, dropout, add);
  };
  128 * of_column <= shared_limit() ? run.template operator()<128>() : run.template operator()<96>();
}

// The factor of a tail in T: itself, where it lies as the product wants it, else a copy.  factor: [rows, columns]
template <class Type>
Tensor tail(const Place& place, const Tensor& factor, int64_t rows, int columns) {
  bool fits = std::is_same_v<typename Type::T, typename Type::Factor> && columns % 8 == 0;
  if (fits && aligned(factor.const_data_ptr())) return factor;
  Tensor result = scratch(place.beside, {rows, round_up(columns)}, Type::dtype);
  copy(place, pointer<typename Type::Factor>(factor), columns, 1, rows, columns, pointer<typename Type::T>(result),
       result.size(1));
  return result;
}

// Raises unless a layer is one of activations of this dtype with k features.
template <class Type>
void check_layer(const LoraLayer& layer, int64_t k) {
  int64_t n = layer.lora_B.size(0), rank = layer.lora_B.size(1);
  contiguous(layer.lora_B, {n, rank}, "lora_B");
  STD_TORCH_CHECK(layer.lora_B.scalar_type() == Type::factor_dtype, "every lora_B must be of lora_A's dtype");
  if (layer.weight) {
    aligned_rows(*layer.weight, n, k, "weight");
    STD_TORCH_CHECK(layer.weight->scalar_type() == Type::dtype, "weight must be of the activations' dtype");
  }
  if (layer.bias) {
    contiguous(*layer.bias, {n}, "bias");
    STD_TORCH_CHECK(layer.bias->scalar_type() == Type::dtype, "bias must be of the activations' dtype");
  }
}

// y = scale * (x weight^T + scaled lora_B^T) + bias, without weight y += the last term.
// scaled: scaling * s, as `rounded` makes it;  scale: [N], only where the product takes it, or null: 1
template <class Type>
void output(const Place& place, const Tensor& x, const LoraLayer& layer, const Tensor& scaled, const float* scale,
            Tensor y) {
  int64_t m = x.size(0), k = x.size(1), n = layer.lora_B.size(0), rank = layer.lora_B.size(1);
  Activation16 in = activation(x, m, k, "x"), out = activation(y, m, n, "y");
  if (!layer.weight || !gemm_pays(m, n)) {
    if (layer.weight) base_forward(x, *layer.weight, layer.bias, y);
    return expand<Type>(place, out, scaled, pointer<typename Type::Factor>(layer.lora_B), 1, rank, rank, {}, true);
  }
  Tensor factor = tail<Type>(place, layer.lora_B, n, rank);
  multiply({.bfloat16 = Type::dtype == ScalarType::BFloat16,
            .rows = m,
            .columns = n,
            .rank = rank,
            .products = {{k, in.data, layer.weight->const_data_ptr(), in.stride, layer.weight->stride(0)}},
            .tail_left = scaled.const_data_ptr(),
            .tail_right = factor.const_data_ptr(),
            .tail_left_stride = scaled.size(1),
            .tail_right_stride = factor.size(1),
            .scale = scale,
            .bias = layer.bias ? layer.bias->const_data_ptr() : nullptr,
            .out = const_cast<void*>(out.data),
            .out_stride = out.stride},
           place.stream);
}

// s = drop(x) lora_A^T;  y = scale * (x weight^T + scaling * s lora_B^T) + bias for every layer and its columns of s.
// False, and nothing done, where there is a scale, which goes with one layer only, and no epilogue that takes it.
// lora_A: [R, K], R the sum of all ranks;  s: [M, R], out;  ys: of every layer [M, N], out;  scale: [N] float32
template <class Type>
bool forward(const Tensor& x, const std::vector<LoraLayer>& layers, Tensor lora_A, const Dropout& dropout,
             const std::vector<Tensor>& ys, Tensor& s, const OptionalTensor& scale = {}) {
  using Factor = typename Type::Factor;
  int64_t m = x.size(0), k = lora_A.size(1), ranks = lora_A.size(0), first = 0;
  OnDevice device(x);
  Place place{x, device.stream()};
  Activation16 in = activation(x, m, k, "x");
  auto* A = reinterpret_cast<Factor*>(contiguous(lora_A, {ranks, k}, "lora_A"));
  STD_TORCH_CHECK(aligned(A), "lora_A must begin at a multiple of 16 bytes");
  float* shrunk = sums<float>(s, {m, ranks}, "s");
  bool few = !dropout.seed && m <= kFusedTokens;
  std::vector<FusedLayer> fused;
  for (size_t i = 0; i < layers.size(); ++i) {
    const LoraLayer& layer = layers[i];
    int64_t rank = layer.lora_B.size(1);
    check_layer<Type>(layer, k);
    activation(ys[i], m, layer.lora_B.size(0), "y");
    STD_TORCH_CHECK(first + rank <= ranks, "the rows of lora_A must be as many as the columns of every lora_B");
    if (few && layer.weight) {
      Tensor own_A = torch::stable::narrow(lora_A, 0, first, rank), own_s = torch::stable::narrow(s, 1, first, rank);
      FusedLayer it{.x = x, .weight = *layer.weight, .bias = layer.bias, .scale = scale, .lora_A = own_A,
                    .lora_B = layer.lora_B, .scaling = layer.scaling, .y = ys[i], .s = own_s};
      if (takes(it)) fused.push_back(it);
    }
    first += rank;
  }
  STD_TORCH_CHECK(first == ranks, "the rows of lora_A must be as many as the columns of every lora_B");
  if (fused.size() == layers.size()) {
    for (const FusedLayer& layer : fused) fused_layer(layer, place.stream);
    return true;
  }
  if (scale && !(layers.size() == 1 && layers[0].weight && gemm_pays(m, layers[0].features()))) return false;
  const float* columns_by = scale ? sums<float>(*scale, {layers[0].features()}, "scale") : nullptr;
  Shrunk out{.s = shrunk, .rank = int(ranks), .stride = int(ranks), .scale = dropout.keep};
  OptionalTensor scaled;
  if (layers.size() == 1) {
    out.rounded_stride = round_up(ranks);
    out.rounded_scale = static_cast<float>(layers[0].scaling);
    scaled = scratch(x, {m, out.rounded_stride}, Type::dtype);
    out.rounded = scaled->mutable_data_ptr();
  }
  shrink<Type>(place, in, A, dropout, out);
  first = 0;
  for (size_t i = 0; i < layers.size(); ++i) {
    int64_t rank = layers[i].lora_B.size(1);
    if (layers.size() > 1) scaled = rounded<Type>(place, shrunk + first, ranks, m, rank, layers[i].scaling);
    output<Type>(place, x, layers[i], *scaled, columns_by, ys[i]);
    first += rank;
  }
  return true;
}

// dx = the sum of dy weight + drop'(ds lora_A), without weight the second term alone.
// dys: of every layer [M, N];  ds: [M, round_up(rank)] of T
template <class Type>
void input_gradient(const Place& place, const std::vector<Tensor>& dys, const std::vector<LoraLayer>& layers,
                    const Tensor& lora_A, const Tensor& ds, const Dropout& dropout, Tensor dx) {
  int64_t m = dx.size(0), k = lora_A.size(1), rank = lora_A.size(0);
  Activation16 out = activation(dx, m, k, "dx");
  size_t summed = 0;  // layers whose product is in dx
  if (!layers[0].weight || dropout.seed || !gemm_pays(m, k)) {  // a mask has to meet the branch alone
    // The branch first: it is the smaller one to be rounded by itself.
    expand<Type>(place, out, ds, pointer<typename Type::Factor>(lora_A), k, 1, rank, dropout, false);
  } else {
    Tensor factor = tail<Type>(place, lora_A, rank, k);
    Gemm it{.bfloat16 = Type::dtype == ScalarType::BFloat16,
            .backward = true,
            .rows = m,
            .columns = k,
            .rank = rank,
            .tail_left = ds.const_data_ptr(),
            .tail_right = factor.const_data_ptr(),
            .tail_left_stride = ds.size(1),
            .tail_right_stride = k,
            .out = const_cast<void*>(out.data),
            .out_stride = out.stride};
    for (; summed < std::min<size_t>(layers.size(), kProducts); ++summed) {
      const Tensor &dy = dys[summed], &weight = *layers[summed].weight;
      it.products[summed] = {weight.size(0), dy.const_data_ptr(), weight.const_data_ptr(), dy.stride(0),
                             weight.stride(0)};
    }
    multiply(it, place.stream);
  }
  for (; summed < layers.size(); ++summed)
    if (layers[summed].weight) base_backward(dys[summed], *layers[summed].weight, dx, true);
}

// The half of a backward pass that reads dy [M, N]: ds where it has a place, and the parts of dlora_B / scaling, where s
// is given.  s: [M, rank] at a stride
template <class Type>
Tensor expand_backward(const Place& place, const Activation16& dy, const float* s, int64_t s_stride,
                       const Tensor& lora_B, const Shrunk& ds) {
  using Factor = typename Type::Factor;
  int64_t n = dy.columns, rank = ds.rank;
  auto* B = pointer<Factor>(lora_B);
  bool together = ds.s && s && worth_one_pass<Type>(rank);
  Tensor parts;
  if (s) parts = gradient<Type>(place, dy, s, s_stride, together ? B : nullptr, {}, ds);
  if (ds.s && !together) {
    Tensor transposed = scratch(place.beside, {rank, n}, Type::factor_dtype);
    copy(place, B, 1, rank, rank, n, pointer<Factor>(transposed), n);
    shrink<Type>(place, dy, pointer<Factor>(transposed), {}, ds);
  }
  return parts;
}

// The gradients of factors from their parts, two at a launch.
template <class Factor>
void sum_gradients(const Place& place, const std::vector<FactorGradient>& jobs) {
  for (size_t i = 0; i < jobs.size(); i += 2) {
    FactorGradient first = jobs[i], second = i + 1 < jobs.size() ? jobs[i + 1] : FactorGradient{};
    int64_t most = std::max(int64_t(first.rank) * first.columns, int64_t(second.rank) * second.columns);
    launch(sum_gradient_kernel<Factor>, dim3(div_up(most / 4, kFinishThreads), second.out ? 2 : 1),
           dim3(kFinishThreads), 0, place.stream, first, second);
  }
}

// ds = scaling * dy lora_B;  dlora_B = scaling * dy^T s for every layer and its columns of ds and s;
// dlora_A = ds^T drop(x);  dx = the sum of dy weight + drop'(ds lora_A), without weight the second term alone.
// dys: of every layer [M, N];  out: dx [M, K], dlora_A [R, K], dlora_Bs of every layer or none
//
// With a scale [N] float32, of one layer, it multiplies dy, which before weight is scaled_dy: that is rounded; in the
// branch, lora_B and dlora_B are multiplied by it instead.
template <class Type>
void backward(const std::vector<Tensor>& dys, const OptionalTensor& x, std::vector<LoraLayer> layers,
              const Tensor& lora_A, const Dropout& dropout, const OptionalTensor& s, OptionalTensor& dx,
              const OptionalTensor& dlora_A, const std::vector<Tensor>& dlora_Bs, const OptionalTensor& scale = {},
              const OptionalTensor& scaled_dy = {}) {
  using Factor = typename Type::Factor;
  int64_t m = dys[0].size(0), k = lora_A.size(1), ranks = lora_A.size(0), first = 0;
  STD_TORCH_CHECK(!dlora_A || x, "dlora_A needs x");
  STD_TORCH_CHECK(dlora_Bs.empty() || s, "dlora_B needs s");
  OnDevice device(dys[0]);
  Place place{dys[0], device.stream()};
  contiguous(lora_A, {ranks, k}, "lora_A");
  bool wants_ds = dx || dlora_A, alone = layers.size() == 1;
  const float* shrunk = s ? sums<float>(*s, {m, ranks}, "s") : nullptr;
  Tensor ds = scratch(place.beside, {wants_ds ? m : 0, ranks}, ScalarType::Float);
  OptionalTensor ds_rounded;
  if (alone && wants_ds) ds_rounded = scratch(place.beside, {m, round_up(ranks)}, Type::dtype);
  const float* columns_by = nullptr;
  if (scale) {
    Tensor& lora_B = layers[0].lora_B;
    int64_t n = layers[0].features(), rank = layers[0].rank();
    STD_TORCH_CHECK(alone, "a scale is that of one layer");
    check_layer<Type>(layers[0], k);
    columns_by = sums<float>(*scale, {n}, "scale");
    Tensor by_rows = scratch(place.beside, {n, rank}, Type::factor_dtype);
    copy(place, pointer<Factor>(lora_B), rank, 1, n, rank, pointer<Factor>(by_rows), rank, 1, columns_by);
    lora_B = by_rows;
  }
  std::vector<Tensor> parts;  // of every factor's gradient
  std::vector<FactorGradient> jobs;
  for (size_t i = 0; i < layers.size(); ++i) {
    const LoraLayer& layer = layers[i];
    int64_t n = layer.lora_B.size(0), rank = layer.lora_B.size(1);
    check_layer<Type>(layer, k);
    STD_TORCH_CHECK(first + rank <= ranks, "the rows of lora_A must be as many as the columns of every lora_B");
    Shrunk own{.s = wants_ds ? pointer<float>(ds) + first : nullptr,
               .rounded = ds_rounded ? ds_rounded->mutable_data_ptr() : nullptr,
               .rank = static_cast<int>(rank),
               .stride = static_cast<int>(ranks),
               .rounded_stride = round_up(rank),
               .scale = static_cast<float>(layer.scaling)};
    const float* own_s = dlora_Bs.empty() ? nullptr : shrunk + first;
    parts.push_back(expand_backward<Type>(place, activation(dys[i], m, n, "dy"), own_s, ranks, layer.lora_B, own));
    if (own_s)
      jobs.push_back({.sums = pointer<float>(parts.back()), .parts = int(parts.back().size(0)), .rank = int(rank),
                      .columns = int(n), .scale = own.scale, .column_scale = columns_by,
                      .out = contiguous(dlora_Bs[i], {n, rank}, "dlora_B"), .transposed = true});
    first += rank;
  }
  STD_TORCH_CHECK(first == ranks, "the rows of lora_A must be as many as the columns of every lora_B");
  if (dx) {
    if (!alone) ds_rounded = rounded<Type>(place, pointer<float>(ds), ranks, m, ranks, 1);
    input_gradient<Type>(place, scaled_dy ? std::vector{*scaled_dy} : dys, layers, lora_A, *ds_rounded, dropout, *dx);
  }
  if (dlora_A) {
    Shrunk of{.rank = static_cast<int>(ranks)};
    parts.push_back(gradient<Type>(place, activation(*x, m, k, "x"), pointer<float>(ds), ranks, nullptr, dropout, of));
    jobs.push_back({.sums = pointer<float>(parts.back()), .parts = int(parts.back().size(0)), .rank = int(ranks),
                    .columns = int(k), .scale = dropout.keep, .out = contiguous(*dlora_A, {ranks, k}, "dlora_A")});
  }
  sum_gradients<Factor>(place, jobs);
}

}  // namespace

bool lora_forward(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& lora_A,
                  const Tensor& lora_B, double scaling, double dropout_p, const OptionalTensor& seed, Tensor y, Tensor s,
                  const OptionalTensor& scale) {
  bool done = false;
  with_types(x, lora_A, lora_B, [&](auto types) {
    LoraLayer layer{weight, bias, lora_B, scaling};
    done = forward<decltype(types)>(x, {layer}, lora_A, dropout_of(seed, dropout_p), {y}, s, scale);
  });
  return done;
}

void lora_backward(const Tensor& dy, const OptionalTensor& x, const OptionalTensor& weight, const Tensor& lora_A,
                   const Tensor& lora_B, double scaling, double dropout_p, const OptionalTensor& seed,
                   const OptionalTensor& s, OptionalTensor dx, const OptionalTensor& dlora_A,
                   const OptionalTensor& dlora_B, const OptionalTensor& scale, const OptionalTensor& scaled_dy) {
  std::vector<Tensor> dlora_Bs;
  if (dlora_B) dlora_Bs.push_back(*dlora_B);
  with_types(dy, lora_A, lora_B, [&](auto types) {
    LoraLayer layer{weight, {}, lora_B, scaling};
    backward<decltype(types)>({dy}, x, {layer}, lora_A, dropout_of(seed, dropout_p), s, dx, dlora_A, dlora_Bs, scale,
                              scaled_dy);
  });
}

void lora_shrink(const Tensor& x, const Tensor& factor, Tensor& s) {
  int64_t m = x.size(0), k = x.size(1), rank = factor.size(0);
  OnDevice device(x);
  Place place{x, device.stream()};
  Shrunk out{.s = sums<float>(s, {m, rank}, "s"), .rank = int(rank), .stride = int(rank)};
  with_types(x, factor, factor, [&](auto types) {
    using Factor = typename decltype(types)::Factor;
    auto* rows = reinterpret_cast<const Factor*>(contiguous(factor, {rank, k}, "factor"));
    STD_TORCH_CHECK(aligned(rows), "factor must begin at a multiple of 16 bytes");
    shrink<decltype(types)>(place, activation(x, m, k, "x"), rows, {}, out);
  });
}

namespace {

void lora_layer_forward(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& lora_A,
                        const Tensor& lora_B, double scaling, double dropout_p, const OptionalTensor& seed, Tensor& y,
                        Tensor& s) {
  lora_forward(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed, y, s);
}

void lora_layer_backward(const Tensor& dy, const OptionalTensor& x, const OptionalTensor& weight, const Tensor& lora_A,
                         const Tensor& lora_B, double scaling, double dropout_p, const OptionalTensor& seed,
                         const OptionalTensor& s, OptionalTensor dx, OptionalTensor dlora_A, OptionalTensor dlora_B) {
  lora_backward(dy, x, weight, lora_A, lora_B, scaling, dropout_p, seed, s, dx, dlora_A, dlora_B);
}

void lora_group_forward(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<OptionalTensor>& biases,
                        const Tensor& lora_A, const std::vector<Tensor>& lora_Bs, const std::vector<double>& scalings,
                        double dropout_p, const OptionalTensor& seed, const std::vector<Tensor>& ys, Tensor& s) {
  auto layers = lora_layers(weights, biases, lora_Bs, scalings);
  STD_TORCH_CHECK(ys.size() == layers.size(), "ys must hold one tensor for each layer");
  with_types(x, lora_A, lora_Bs[0], [&](auto types) {
    forward<decltype(types)>(x, layers, lora_A, dropout_of(seed, dropout_p), ys, s);
  });
}

void lora_group_backward(const std::vector<Tensor>& dys, const OptionalTensor& x, const std::vector<Tensor>& weights,
                         const Tensor& lora_A, const std::vector<Tensor>& lora_Bs, const std::vector<double>& scalings,
                         double dropout_p, const OptionalTensor& seed, const OptionalTensor& s, OptionalTensor dx,
                         OptionalTensor dlora_A, const std::vector<Tensor>& dlora_Bs) {
  auto layers = lora_layers(weights, {}, lora_Bs, scalings);
  STD_TORCH_CHECK(dys.size() == layers.size() && (dlora_Bs.empty() || dlora_Bs.size() == layers.size()),
                  "dys and dlora_Bs must hold one tensor for each layer");
  with_types(dys[0], lora_A, lora_Bs[0], [&](auto types) {
    backward<decltype(types)>(dys, x, layers, lora_A, dropout_of(seed, dropout_p), s, dx, dlora_A, dlora_Bs);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyfastpeft, CUDA, m) {
  m.impl("lora_forward", TORCH_BOX(&lora_layer_forward));
  m.impl("lora_backward", TORCH_BOX(&lora_layer_backward));
  m.impl("lora_group_forward", TORCH_BOX(&lora_group_forward));
  m.impl("lora_group_backward", TORCH_BOX(&lora_group_backward));
}

}  // namespace pyfastpeft
