#include "ops/cuda/decode.h"

#include <algorithm>

#include "ops/cuda/counters.h"
#include "ops/cuda/elements.h"
#include "ops/cuda/routing.h"
#include "ops/cuda/runtime.h"

namespace pyfastpeft {

namespace {

constexpr int kStages = 5;
constexpr int kColumns = 64;   // of y that an item computes
constexpr int kDepth = 64;     // features of a step: a row of it is 128 bytes in shared memory
constexpr int kSlices = 4;     // of 16 ranks, whichever adapters', that a step of the tail has
constexpr int kWanted = 128;   // items that a launch aims at, whatever the device
constexpr int kFirstCounter = 3;

template <class T>
struct Layer {
  Matrix<const T> x;  // [T, K]
  const T* weight;    // [N, K]
  int64_t weight_stride;
  const T* bias;       // [N] or null
  const float* scale;  // [N] or null
  const T* lora_A;     // [L, R, K]
  const T* lora_B;     // [L, N, R]
  float scaling;
  const float* scalings;  // [L] or null
  Routing routing;
  Matrix<T> y;          // [T, N]
  float* s;             // [T, R] at
  int64_t s_stride;
  float* shrink_planes; // [shrink parts, T, R]
  float* base_planes;   // [parts - 1, T rounded up to 16s, N rounded up to kColumns]
  int parts;            // of the features and of the tail: as many items share kColumns columns
};

// Shared memory of fused_kernel, in order.
struct FusedShared {
  size_t tokens, tiles, slices, ranks, ring, total;

  __host__ __device__ FusedShared(int rank, int most_tiles, int token_tiles, int count)
      : tokens(16 * sizeof(int)),
        tiles(tokens + kFusedTokens * sizeof(int)),
        slices(tiles + most_tiles * sizeof(Tile)),
        ranks(rounded(slices + most_tiles * ((rank + 15) / 16) * sizeof(int))),
        ring(rounded(ranks + (kTile * token_tiles + 1) * padded(rank) * 2)),
        total(ring + most(kStages * stage(token_tiles), kWarps * kTile * 8 * count * sizeof(float))) {}

  // Elements of a row of s: as many 16 bytes that eight rows fall on all banks.
  __host__ __device__ static int padded(int rank) { return (rank + 15) / 16 * 16 + 8; }
  __host__ __device__ static size_t stage(int token_tiles) { return (kTile * token_tiles + kColumns) * kDepth * 2; }
  __host__ __device__ static size_t rounded(size_t bytes) { return (bytes + 127) / 128 * 128; }
  __host__ __device__ static size_t most(size_t a, size_t b) { return a > b ? a : b; }
};

// Where 16 bytes, number `run` of a row, lie in a stage: eight neighbouring rows are on different banks.
__device__ __forceinline__ int swizzled(int row, int run) { return row * kDepth + (run ^ row % 8) * 8; }

// y = scale * (x weight^T + scaling * s lora_B^T) + bias, s = x lora_A^T, by adapters.
//
// Blocks take items from a counter: first those of the shrink, then kColumns columns of y by one part of the features.
// An item of y streams its part of weight through a ring of shared memory, and behind it, in the same ring, slices of
// lora_B; before the first of these meets s it waits until the shrink is done. The last part of the same columns adds
// up all parts in their order. An item waits only for items that were taken before it, so that no block has to be
// resident for another to end. Positions, not tokens, are rows: those of one adapter lie next to each other.
template <class T, int token_tiles, int count>
__global__ void __launch_bounds__(kThreads, 2) fused_kernel(Layer<T> a, int* counters, int most_tiles) {
  constexpr int rows = kTile * token_tiles;
  // Of a warp: 16 rows, and 8 * token_tiles columns.
  constexpr int column_warps = kWarps / token_tiles;
  auto* memory = shared_memory<char>();
  FusedShared shared(a.routing.rank, most_tiles, token_tiles, count);
  auto* numbers = reinterpret_cast<int*>(memory);
  auto* tokens = reinterpret_cast<int*>(memory + shared.tokens);
  auto* tiles = reinterpret_cast<Tile*>(memory + shared.tiles);
  auto* slices = reinterpret_cast<int*>(memory + shared.slices);  // tile * 256 + number of 16 ranks
  auto* shrunk = reinterpret_cast<T*>(memory + shared.ranks);     // [rows + 1, padded], the last row zero
  auto* ring = reinterpret_cast<T*>(memory + shared.ring);
  const Routing& routing = a.routing;
  int *taken = counters, *done = counters + 1, *left = counters + 2, *columns_done = counters + kFirstCounter;
  int next = threadIdx.x == 0 ? atomicAdd(taken, 1) : 0;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4, rank = routing.rank;
  int row_tile = warp / column_warps * kTile, column_tile = warp % column_warps * 8 * token_tiles;
  int stride = FusedShared::padded(rank);

  for (int i = threadIdx.x; i < rows; i += kThreads)
    tokens[i] = i < routing.tokens ? static_cast<int>(routing.token(i)) : -1;
  int tile_count = for_adapters(routing, kTile, false, numbers, [&](int tile, int adapter, int first, int end) {
    for (; first < end; first += kTile)
      tiles[tile++] = {adapter, first, min(kTile, end - first), routing.rank_of(adapter)};
  });
  __syncthreads();
  int slice_count = 0;
  for (int begin = 0; begin < tile_count; begin += kThreads) {
    int tile = begin + threadIdx.x, own = tile < tile_count ? (tiles[tile].rank + 15) / 16 : 0;
    int total, before = slice_count + sum_before(own, numbers, total);
    for (int i = 0; i < own; ++i) slices[before + i] = tile * 256 + i;
    slice_count += total;
  }
  ShrinkItems shrinks(rank, a.x.columns, count);
  int shrink_items = tile_count * shrinks.of_tile();
  int column_items = (a.y.columns + kColumns - 1) / kColumns, steps = (a.x.columns + kDepth - 1) / kDepth;
  bool s_at_hand = false;

  for (;;) {
    if (threadIdx.x == 0) numbers[kWarps] = next;
    __syncthreads();
    int item = numbers[kWarps];
    if (item >= shrink_items + column_items * a.parts) break;
    if (threadIdx.x == 0) next = atomicAdd(taken, 1);
    if (item < shrink_items) {
      shrink_item<T, true, count>(item, tiles, shrinks, a.x, a.lora_A, routing, a.shrink_planes,
                                  reinterpret_cast<float*>(ring));
      __syncthreads();
      if (threadIdx.x == 0) add_release(done, 1);
      continue;
    }
    item -= shrink_items;
    int part = item / column_items, column = item % column_items * kColumns;
    int step = steps * part / a.parts, base_steps = steps * (part + 1) / a.parts - step;
    int slice = slice_count * part / a.parts, own_slices = slice_count * (part + 1) / a.parts - slice;
    int all_steps = base_steps + (own_slices + kSlices - 1) / kSlices;

    // Asks for what step i needs: rows of x, and behind them rows of weight or slices of lora_B.
    auto load = [&](int i) {
      T* stage = ring + i % kStages * (FusedShared::stage(token_tiles) / sizeof(T));
      if (i < base_steps) {
        int k = (step + i) * kDepth;
        for (int piece = threadIdx.x; piece < (rows + kColumns) * 8; piece += kThreads) {
          int row = piece / 8, run = piece % 8, valid = k + 8 * run < a.x.columns ? 16 : 0;
          const T* from = a.weight;
          if (row < rows) {
            if (tokens[row] < 0) valid = 0;
            if (valid) from = a.x.data + tokens[row] * a.x.stride + k + 8 * run;
          } else {
            int n = column + row - rows;
            if (n >= a.y.columns) valid = 0;
            if (valid) from = a.weight + n * a.weight_stride + k + 8 * run;
          }
          copy_async(stage + swizzled(row, run), from, valid);
        }
      } else if (i < all_steps) {
        int first = (i - base_steps) * kSlices;
        for (int piece = threadIdx.x; piece < kColumns * 8; piece += kThreads) {
          int row = piece / 8, run = piece % 8, n = column + row, valid = 0;
          const T* from = a.weight;
          if (first + run / 2 < own_slices && n < a.y.columns) {
            int number = slices[slice + first + run / 2], j = number % 256 * 16 + run % 2 * 8;
            Tile tile = tiles[number / 256];
            valid = max(0, min(16, (tile.rank - j) * 2));
            if (valid) from = a.lora_B + (int64_t(tile.adapter) * a.y.columns + n) * rank + j;
          }
          copy_async(stage + swizzled(rows + row, run), from, valid);
        }
      }
      commit_async();
    };

    float own[token_tiles][4] = {};
    // sums += 16 terms: rows of the left begin at the addresses that lanes bring, those of the right are in a stage.
    auto multiply = [&](float (&sums)[token_tiles][4], const T* left, const T* stage, int sixteen) {
      uint32_t x[4];
      ldmatrix(x, left);
#pragma unroll
      for (int pair = 0; pair < (token_tiles + 1) / 2; ++pair) {
        // Matrices: rows 0 to 7 of the first 8 terms, of the last 8; rows 8 to 15 of both.
        int row = min(column_tile + 16 * pair + lane / 16 * 8 + lane % 8, kColumns - 1);
        uint32_t w[4];
        ldmatrix(w, stage + swizzled(rows + row, 2 * sixteen + lane / 8 % 2));
        uint32_t first[] = {w[0], w[1]}, second[] = {w[2], w[3]};
        mma<T>(sums[2 * pair], x, first);
        if constexpr (token_tiles > 1) mma<T>(sums[2 * pair + 1], x, second);
      }
    };

    __syncthreads();
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) load(i);
    for (int i = 0; i < all_steps; ++i) {
      wait_async<kStages - 2>();
      __syncthreads();
      load(i + kStages - 1);
      const T* stage = ring + i % kStages * (FusedShared::stage(token_tiles) / sizeof(T));
      int left_row = row_tile + lane % 16;
      if (i < base_steps) {
#pragma unroll
        for (int sixteen = 0; sixteen < kDepth / 16; ++sixteen)
          multiply(own, stage + swizzled(left_row, 2 * sixteen + lane / 16), stage, sixteen);
        continue;
      }
      if (!s_at_hand) {
        s_at_hand = true;
        if (threadIdx.x == 0)
          while (load_acquire(done) < shrink_items) continue;
        __syncthreads();
        for (int j = threadIdx.x; j < (rows + 1) * stride; j += kThreads) shrunk[j] = T(0.f);
        __syncthreads();
        // A warp has a tile.
        for (int tile = warp; tile < tile_count; tile += kWarps) {
          Tile of = tiles[tile];
          float scaling = a.scaling * (a.scalings ? a.scalings[of.adapter] : 1.f);
          for (int j = lane; j < of.count * of.rank; j += 32) {
            int position = of.first + j / of.rank;
            int64_t at = int64_t(tokens[position]) * rank + j % of.rank;
            float sum = 0;
            for (int h = 0; h < shrinks.parts; ++h)
              sum += __ldcg(a.shrink_planes + int64_t(h) * routing.tokens * rank + at);
            shrunk[position * stride + j % of.rank] = T(scaling * sum);
          }
        }
        __syncthreads();
      }
      int first = (i - base_steps) * kSlices;
      for (int sixteen = 0; sixteen < kSlices && first + sixteen < own_slices; ++sixteen) {
        int number = slices[slice + first + sixteen];
        Tile tile = tiles[number / 256];
        if (tile.first >= row_tile + kTile || tile.first + tile.count <= row_tile) continue;
        auto of_tile = [&](int row) { return row >= tile.first && row < tile.first + tile.count; };
        // Rows of other adapters are zero, and zero times what is not finite is to reach nobody.
        float sums[token_tiles][4] = {};
        int row = of_tile(left_row) ? left_row : rows;
        multiply(sums, shrunk + row * stride + number % 256 * 16 + lane / 16 * 8, stage, sixteen);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (!of_tile(row_tile + g + i / 2 * 8)) continue;
#pragma unroll
          for (int q = 0; q < token_tiles; ++q) own[q][i] += sums[q][i];
        }
      }
    }
    wait_async<0>();

    // What a lane has: rows g and g + 8 of its tile, columns 2t and the next of every eight.
    int64_t plane_stride = int64_t(column_items) * kColumns;
    auto plane = [&](int h, int q, int half) {
      return a.base_planes + (int64_t(h) * rows + row_tile + g + 8 * half) * plane_stride + column + column_tile +
             8 * q + 2 * t;
    };
    if (part < a.parts - 1) {
#pragma unroll
      for (int q = 0; q < token_tiles; ++q)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          *reinterpret_cast<float2*>(plane(part, q, half)) = make_float2(own[q][2 * half], own[q][2 * half + 1]);
      __syncthreads();
      if (threadIdx.x == 0) add_release(columns_done + item % column_items, 1);
      continue;
    }
    if (a.parts > 1) {
      if (threadIdx.x == 0)
        while (load_acquire(columns_done + item % column_items) < a.parts - 1) continue;
      __syncthreads();
      for (int h = 0; h < a.parts - 1; ++h)
#pragma unroll
        for (int q = 0; q < token_tiles; ++q)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float2 other = __ldcg(reinterpret_cast<const float2*>(plane(h, q, half)));
            own[q][2 * half] += other.x;
            own[q][2 * half + 1] += other.y;
          }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int position = row_tile + g + 8 * half;
      if (position >= routing.tokens) continue;
      T* row = a.y.data + tokens[position] * a.y.stride;
#pragma unroll
      for (int q = 0; q < token_tiles; ++q) {
        int n = column + column_tile + 8 * q + 2 * t;
        if (n >= a.y.columns) continue;
        float2 scale = a.scale ? *reinterpret_cast<const float2*>(a.scale + n) : make_float2(1.f, 1.f);
        float2 bias = a.bias ? unpack<T>(*reinterpret_cast<const uint32_t*>(a.bias + n)) : make_float2(0.f, 0.f);
        *reinterpret_cast<uint32_t*>(row + n) =
            pack<T>(scale.x * own[q][2 * half] + bias.x, scale.y * own[q][2 * half + 1] + bias.y);
      }
    }
    if (column == 0 && s_at_hand) {
      for (int tile = warp; tile < tile_count; tile += kWarps) {
        Tile of = tiles[tile];
        for (int j = lane; j < of.count * of.rank; j += 32) {
          int64_t token = tokens[of.first + j / of.rank], at = token * rank + j % of.rank;
          float sum = 0;
          for (int h = 0; h < shrinks.parts; ++h)
            sum += __ldcg(a.shrink_planes + int64_t(h) * routing.tokens * rank + at);
          a.s[token * a.s_stride + j % of.rank] = sum;
        }
      }
    }
  }
  // The last to leave clears the counters for the next launch.
  if (threadIdx.x == 0 && add_release(left, 1) == static_cast<int>(gridDim.x) - 1) {
    *taken = *done = *left = 0;
    if (a.parts > 1)
      for (int i = 0; i < column_items; ++i) columns_done[i] = 0;
  }
}

bool in_runs(const Tensor& t, int64_t columns) {
  return t.stride(-1) == 1 && in_runs(rows_of(t, t.size(0), columns, "tensor"), columns);
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <class T>
void run(const FusedLayer& a, cudaStream_t stream) {
  int64_t tokens = a.x.size(0), k = a.x.size(1), n = a.weight.size(0), rank = a.lora_A.size(-2);
  int64_t adapters = a.lora_A.dim() == 3 ? a.lora_A.size(0) : 1;
  Rows s = rows_of(a.s, tokens, rank, "s");
  STD_TORCH_CHECK(s.dtype == Dtype::f32, "s must be of the dtype of sums");
  OptionalTensor own;
  int* zeros = counters(a.x, stream, own);
  Routing routing{a.order ? integers(*a.order, tokens, "order") : nullptr,
                  a.segments ? integers(*a.segments, adapters + 1, "segments") : nullptr,
                  a.ranks ? integers(*a.ranks, adapters, "ranks") : nullptr,
                  static_cast<int>(adapters),
                  static_cast<int>(rank),
                  static_cast<int>(tokens)};
  int64_t column_items = (n + kColumns - 1) / kColumns, steps = (k + kDepth - 1) / kDepth;
  int64_t parts = std::clamp<int64_t>(kWanted / column_items, 1, std::min<int64_t>(8, std::max<int64_t>(steps / 8, 1)));
  int tiles = static_cast<int>(tokens / kTile + std::min(adapters, tokens));
  auto launched = [&]<int token_tiles, int count>() {
    constexpr int rows = kTile * token_tiles;
    ShrinkItems shrinks(routing.rank, k, count);
    Tensor shrink_planes = scratch(a.x, {shrinks.parts, tokens, rank}, ScalarType::Float);
    Tensor base_planes = scratch(a.x, {parts - 1, rows, column_items * kColumns}, ScalarType::Float);
    Layer<T> layer{{static_cast<const T*>(a.x.const_data_ptr()), a.x.stride(0), static_cast<int>(k)},
                   static_cast<const T*>(a.weight.const_data_ptr()),
                   a.weight.stride(0),
                   a.bias ? static_cast<const T*>(a.bias->const_data_ptr()) : nullptr,
                   a.scale ? sums<float>(*a.scale, {n}, "scale") : nullptr,
                   static_cast<const T*>(a.lora_A.const_data_ptr()),
                   static_cast<const T*>(a.lora_B.const_data_ptr()),
                   static_cast<float>(a.scaling),
                   a.scalings ? sums<float>(*a.scalings, {adapters}, "scaling") : nullptr,
                   routing,
                   {static_cast<T*>(a.y.mutable_data_ptr()), a.y.stride(0), static_cast<int>(n)},
                   reinterpret_cast<float*>(s.data),
                   s.stride,
                   static_cast<float*>(shrink_planes.mutable_data_ptr()),
                   static_cast<float*>(base_planes.mutable_data_ptr()),
                   static_cast<int>(parts)};
    size_t shared = FusedShared(routing.rank, tiles, token_tiles, count).total;
    auto kernel = fused_kernel<T, token_tiles, count>;
    int64_t blocks =
        std::min(tiles * shrinks.of_tile() + column_items * parts, resident_blocks(kernel, kThreads, shared));
    launch(kernel, dim3(blocks), dim3(kThreads), shared, stream, layer, zeros, tiles);
  };
  auto chosen = [&]<int token_tiles>() {
    rank <= 16 ? launched.template operator()<token_tiles, 2>() : launched.template operator()<token_tiles, 4>();
  };
  tokens <= 16   ? chosen.template operator()<1>()
  : tokens <= 32 ? chosen.template operator()<2>()
                 : chosen.template operator()<4>();
}

}  // namespace

bool takes(const FusedLayer& a) {
  int64_t tokens = a.x.size(0), k = a.x.size(1), n = a.weight.size(0), rank = a.lora_A.size(-2);
  Dtype dtype = dtype_of(a.x, "x");
  auto same = [&](const Tensor& t) { return dtype_of(t, "tensor") == dtype; };
  return item_size(dtype) == 2 && same(a.weight) && same(a.lora_A) && same(a.lora_B) && same(a.y) &&
         (!a.bias || same(*a.bias)) && tokens > 0 && tokens <= kFusedTokens && k % 8 == 0 && n % 8 == 0 &&
         rank % 8 == 0 && rank > 0 && rank <= 256 && in_runs(a.x, k) && in_runs(a.weight, k) && in_runs(a.y, n) &&
         a.lora_A.is_contiguous() && a.lora_B.is_contiguous() && aligned(a.lora_A.const_data_ptr()) &&
         aligned(a.lora_B.const_data_ptr()) && (!a.bias || aligned(a.bias->const_data_ptr())) &&
         (!a.scale || aligned(a.scale->const_data_ptr()));
}

void fused_layer(const FusedLayer& a, cudaStream_t stream) {
  dtype_of(a.x, "x") == Dtype::bf16 ? run<__nv_bfloat16>(a, stream) : run<__half>(a, stream);
}

}  // namespace pyfastpeft
