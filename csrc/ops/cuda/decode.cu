#include "ops/cuda/decode.h"

#include <algorithm>

#include "ops/cuda/counters.h"
#include "ops/cuda/elements.h"
#include "ops/cuda/routing.h"
#include "ops/cuda/runtime.h"

namespace pyfastpeft {

namespace {

constexpr int kDepth = 64;     // features of a step: a row of it is 128 bytes in shared memory
template <class F>
constexpr int kSlices = kDepth / 8 / sizeof(F);  // of 16 ranks, whichever adapters', that a step of the tail has
constexpr int kPass = kThreads / (kDepth * 2 / 16);  // rows of a step that all threads together load at a time
constexpr int kWanted = 128;   // items that a launch aims at, whatever the device
constexpr int kFirstCounter = 3;
constexpr int kFusedRank = 256;

// How an item of up to `token_tiles` tiles of tokens is cut: columns of y, and stages of the ring.
template <int token_tiles, int columns, int stages>
struct Cut {
  static constexpr int kRows = kTile * token_tiles, kColumns = columns, kStages = stages;
  static constexpr int kRowWarps = token_tiles == 1 ? 1 : 2, kColumnWarps = kWarps / kRowWarps;
  static constexpr int kRowTiles = token_tiles / kRowWarps, kEights = kColumns / kColumnWarps / 8;  // of a warp
  static constexpr size_t kStage = (kRows + kColumns) * kDepth * 2;                                 // bytes
};

template <class T, class F>
struct Layer {
  Matrix<const T> x;  // [T, K]
  const T* weight;    // [N, K]
  int64_t weight_stride;
  const T* bias;       // [N] or null
  const float* scale;  // [N] or null
  bool scales_bias;
  const F* lora_A;     // [L, R, K]
  const F* lora_B;     // [L, N, R]
  float scaling;
  const float* scalings;  // [L] or null
  Routing routing;
  Matrix<T> y;          // [T, N]
  float* s;             // [T, R] at
  int64_t s_stride;
  float* shrink_planes; // [shrink parts, T, R]
  float* base_planes;   // [parts - 1, kRows, N rounded up to kColumns]
  int parts;            // of the features and of the tail: as many items share kColumns columns
};

// What a position of `order` is multiplied by.
struct Adapted {
  int rank;  // 0 where it has no adapter
  float scaling;
};

// Shared memory of fused_kernel, in order.
template <class Cut>
struct FusedShared {
  size_t tokens, adapted, tiles, slices, ranks, ring, total;

  __host__ __device__ constexpr FusedShared(int rank, int most_tiles)
      : tokens(16 * sizeof(int)),
        adapted(tokens + Cut::kRows * sizeof(int)),
        tiles(adapted + Cut::kRows * sizeof(Adapted)),
        slices(tiles + most_tiles * sizeof(Tile)),
        ranks(rounded(slices + most_tiles * ((rank + 15) / 16) * sizeof(int))),
        ring(rounded(ranks + (Cut::kRows + 1) * padded(rank) * 2)),
        total(ring + Cut::kStages * Cut::kStage) {}

  // Elements of a row of s: as many 16 bytes that eight rows fall on all banks.
  __host__ __device__ static constexpr int padded(int rank) { return (rank + 15) / 16 * 16 + 8; }
  __host__ __device__ static constexpr size_t rounded(size_t bytes) { return (bytes + 127) / 128 * 128; }
};

// Where 16 bytes, number `run` of a row, lie in a stage of elements E: a run of eight neighbouring rows, or two runs of
// four rows of float32, are on different banks.
template <class E>
__device__ __forceinline__ int swizzled(int row, int run) {
  constexpr int size = 16 / sizeof(E);
  return (row * 8 + (run ^ row * int(sizeof(E) / 2) % 8)) * size;
}

// y = scale * (x weight^T + scaling * s lora_B^T) + bias, s = x lora_A^T, by adapters; or scale * (.. + bias).
//
// Blocks take items from a counter: first those of the shrink, then kColumns columns of y by one part of the features.
// An item of y streams its part of weight through a ring of shared memory, and behind it, in the same ring, slices of
// lora_B; before the first of these meets s it waits until the shrink is done. The last part of the same columns adds
// up all parts in their order. An item waits only for items that were taken before it, so that no block has to be
// resident for another to end. Positions, not tokens, are rows: those of one adapter lie next to each other.
template <class T, class F, class Cut, int count>
__global__ void __launch_bounds__(kThreads, 2) fused_kernel(Layer<T, F> a, int* counters, int most_tiles) {
  static_assert(kWarps * kTile * 8 * count * sizeof(float) <= Cut::kStages * Cut::kStage, "shrink_item's sums");
  constexpr int rows = Cut::kRows, kColumns = Cut::kColumns, kStages = Cut::kStages, kEights = Cut::kEights;
  auto* memory = shared_memory<char>();
  FusedShared<Cut> shared(a.routing.rank, most_tiles);
  auto* numbers = reinterpret_cast<int*>(memory);
  auto* tokens = reinterpret_cast<int*>(memory + shared.tokens);
  auto* adapted = reinterpret_cast<Adapted*>(memory + shared.adapted);
  auto* tiles = reinterpret_cast<Tile*>(memory + shared.tiles);
  auto* slices = reinterpret_cast<int*>(memory + shared.slices);  // tile * 256 + number of 16 ranks
  auto* shrunk = reinterpret_cast<T*>(memory + shared.ranks);     // [rows + 1, padded], the last row zero
  auto* ring = reinterpret_cast<T*>(memory + shared.ring);
  const Routing& routing = a.routing;
  int *taken = counters, *done = counters + 1, *left = counters + 2, *columns_done = counters + kFirstCounter;
  int next = threadIdx.x == 0 ? atomicAdd(taken, 1) : 0;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4, rank = routing.rank;
  int first_row = warp / Cut::kColumnWarps * Cut::kRowTiles * kTile;  // and column of this warp
  int first_column = warp % Cut::kColumnWarps * kEights * 8;
  int stride = shared.padded(rank);

  for (int i = threadIdx.x; i < rows; i += kThreads) {
    tokens[i] = i < routing.tokens ? static_cast<int>(routing.token(i)) : -1;
    adapted[i].rank = 0;
  }
  int tile_count = for_adapters(routing, kTile, false, numbers, [&](int tile, int adapter, int first, int end) {
    for (; first < end; first += kTile)
      tiles[tile++] = {adapter, first, min(kTile, end - first), routing.rank_of(adapter)};
  });
  __syncthreads();
  for (int i = threadIdx.x; i < tile_count * kTile; i += kThreads) {
    Tile tile = tiles[i / kTile];
    float scaling = a.scaling * (a.scalings ? a.scalings[tile.adapter] : 1.f);
    if (i % kTile < tile.count) adapted[tile.first + i % kTile] = {tile.rank, scaling};
  }
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
  // Of every row of a step a thread loads the same 16 bytes, and of all tokens the same rows.
  int run = threadIdx.x % (kDepth / 8), loaded_row = threadIdx.x / (kDepth / 8);
  constexpr int x_passes = (rows + kPass - 1) / kPass;
  const T* x_rows[x_passes];
  bool there[x_passes];
#pragma unroll
  for (int pass = 0; pass < x_passes; ++pass) {
    int row = loaded_row + pass * kPass, token = row < rows ? tokens[row] : -1;
    there[pass] = token >= 0;
    x_rows[pass] = a.x.data + max(token, 0) * a.x.stride + 8 * run;
  }

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
    int all_steps = base_steps + (own_slices + kSlices<F> - 1) / kSlices<F>;

    // Asks for what step i needs: rows of x, and behind them rows of weight or slices of lora_B. What a copy of no bytes
    // would read may lie anywhere.
    const T* weight_rows = a.weight + (column + loaded_row) * a.weight_stride + 8 * run;
    int columns_left = a.y.columns - column - loaded_row;
    auto load = [&](int i) {
      T* stage = ring + i % kStages * (Cut::kStage / sizeof(T));
      if (i < base_steps) {
        T* to = stage + swizzled<T>(loaded_row, run);
        int k = (step + i) * kDepth, size = k + 8 * run < a.x.columns ? 16 : 0;
#pragma unroll
        for (int pass = 0; pass < x_passes; ++pass)
          if (rows >= kPass || loaded_row < rows)
            copy_async(to + pass * kPass * kDepth, x_rows[pass] + k, there[pass] ? size : 0);
        const T* from = weight_rows + k;
#pragma unroll
        for (int row = 0; row < kColumns; row += kPass, from += kPass * a.weight_stride)
          copy_async(to + (rows + row) * kDepth, from, row < columns_left ? size : 0);
      } else if (i < all_steps) {
        constexpr int runs = sizeof(F);  // of a slice: 16 elements of 16 bytes
        int number = (i - base_steps) * kSlices<F> + run / runs, size = 0;
        F* to = reinterpret_cast<F*>(stage) + swizzled<F>(loaded_row, run);
        const F* from = a.lora_B;
        if (number < own_slices) {
          int of_tile = slices[slice + number], j = (of_tile % 256 * runs + run % runs) * (16 / runs);
          Tile tile = tiles[of_tile / 256];
          size = max(0, min(16, (tile.rank - j) * int(sizeof(F))));
          from += (int64_t(tile.adapter) * a.y.columns + column + loaded_row) * rank + j;
        }
#pragma unroll
        for (int row = 0; row < kColumns; row += kPass, from += kPass * rank)
          copy_async(to + (rows + row) * (kDepth * 2 / runs), from, row < columns_left ? size : 0);
      }
      commit_async();
    };

    float own[Cut::kRowTiles][kEights][4] = {};
    // 16 terms of the warp's columns, from a stage: every two w hold 8 columns.
    auto load_columns = [&](uint32_t (&w)[(kEights + 1) / 2][4], const T* stage, int sixteen) {
#pragma unroll
      for (int pair = 0; pair < (kEights + 1) / 2; ++pair) {
        // Matrices: rows 0 to 7 of the first 8 terms, of the last 8; rows 8 to 15 of both.
        int row = min(first_column + 16 * pair + lane / 16 * 8 + lane % 8, kColumns - 1);
        ldmatrix(w[pair], stage + swizzled<T>(rows + row, 2 * sixteen + lane / 8 % 2));
      }
    };
    // The same of a slice, rounded to T.
    auto load_slice = [&](uint32_t (&w)[(kEights + 1) / 2][4], const T* stage, int sixteen) {
      if constexpr (std::is_same_v<T, F>) {
        load_columns(w, stage, sixteen);
      } else {
#pragma unroll
        for (int i = 0; i < 2 * kEights; ++i) {
          int row = rows + first_column + i / 2 * 8 + g, run = 4 * sixteen + i % 2 * 2 + t / 2;
          const float* from = reinterpret_cast<const float*>(stage) + swizzled<float>(row, run) + t % 2 * 2;
          float2 two = *reinterpret_cast<const float2*>(from);
          w[i / 4][i % 4] = pack<T>(two.x, two.y);
        }
      }
    };
    // sums += 16 terms: rows of the left begin at the addresses that lanes bring.
    auto multiply = [&](float (&sums)[kEights][4], const T* left, const uint32_t (&w)[(kEights + 1) / 2][4]) {
      uint32_t x[4];
      ldmatrix(x, left);
#pragma unroll
      for (int eight = 0; eight < kEights; ++eight) {
        const uint32_t* two = w[eight / 2] + eight % 2 * 2;
        uint32_t right[] = {two[0], two[1]};
        mma<T>(sums[eight], x, right);
      }
    };

    __syncthreads();
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) load(i);
    for (int i = 0; i < all_steps; ++i) {
      wait_async<kStages - 2>();
      __syncthreads();
      load(i + kStages - 1);
      const T* stage = ring + i % kStages * (Cut::kStage / sizeof(T));
      uint32_t w[(kEights + 1) / 2][4];
      if (i < base_steps) {
#pragma unroll
        for (int sixteen = 0; sixteen < kDepth / 16; ++sixteen) {
          load_columns(w, stage, sixteen);
#pragma unroll
          for (int tile = 0; tile < Cut::kRowTiles; ++tile)
            multiply(own[tile], stage + swizzled<T>(first_row + kTile * tile + lane % 16, 2 * sixteen + lane / 16), w);
        }
        continue;
      }
      bool stores_s = column == 0 && part == a.parts - 1 && i == base_steps;
      if (!s_at_hand || stores_s) {
        s_at_hand = true;
        if (threadIdx.x == 0)
          while (load_acquire(done) < shrink_items) continue;
        __syncthreads();
        for (int at = threadIdx.x; at < (rows + 1) * stride; at += kThreads) {
          int position = at / stride, j = at % stride;
          float sum = 0;
          if (position < rows && j < adapted[position].rank) {
            int64_t token = tokens[position];
            const float* plane = a.shrink_planes + token * rank + j;
#pragma unroll 8
            for (int h = 0; h < shrinks.parts; ++h) sum += __ldcg(plane + int64_t(h) * routing.tokens * rank);
            if (stores_s) a.s[token * a.s_stride + j] = sum;
            sum *= adapted[position].scaling;
          }
          shrunk[at] = T(sum);
        }
        __syncthreads();
      }
      int first = (i - base_steps) * kSlices<F>;
      for (int sixteen = 0; sixteen < kSlices<F> && first + sixteen < own_slices; ++sixteen) {
        int number = slices[slice + first + sixteen];
        Tile of = tiles[number / 256];
        auto has = [&](int row) { return row >= of.first && row < of.first + of.count; };
        load_slice(w, stage, sixteen);
#pragma unroll
        for (int tile = 0; tile < Cut::kRowTiles; ++tile) {
          int top = first_row + kTile * tile, row = top + lane % 16;
          if (of.first >= top + kTile || of.first + of.count <= top) continue;
          // Rows of other adapters are zero, and zero times what is not finite is to reach nobody.
          float sums[kEights][4] = {};
          multiply(sums, shrunk + (has(row) ? row : rows) * stride + number % 256 * 16 + lane / 16 * 8, w);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (!has(top + g + i / 2 * 8)) continue;
#pragma unroll
            for (int q = 0; q < kEights; ++q) own[tile][q][i] += sums[q][i];
          }
        }
      }
    }
    wait_async<0>();

    // What a lane has: rows g and g + 8 of every tile, columns 2t and the next of every eight.
    int64_t plane_stride = int64_t(column_items) * kColumns;
    auto for_pairs = [&](auto visit) {
#pragma unroll
      for (int tile = 0; tile < Cut::kRowTiles; ++tile)
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int q = 0; q < kEights; ++q)
            visit(first_row + kTile * tile + g + 8 * half, column + first_column + 8 * q + 2 * t,
                  own[tile][q][2 * half], own[tile][q][2 * half + 1]);
    };
    if (part < a.parts - 1) {
      float* plane = a.base_planes + int64_t(part) * rows * plane_stride;
      for_pairs([&](int row, int n, float& x, float& y) {
        *reinterpret_cast<float2*>(plane + row * plane_stride + n) = make_float2(x, y);
      });
      __syncthreads();
      if (threadIdx.x == 0) add_release(columns_done + item % column_items, 1);
      continue;
    }
    if (a.parts > 1) {
      if (threadIdx.x == 0)
        while (load_acquire(columns_done + item % column_items) < a.parts - 1) continue;
      __syncthreads();
      for (int h = 0; h < a.parts - 1; ++h) {
        const float* plane = a.base_planes + int64_t(h) * rows * plane_stride;
        for_pairs([&](int row, int n, float& x, float& y) {
          float2 other = __ldcg(reinterpret_cast<const float2*>(plane + row * plane_stride + n));
          x += other.x;
          y += other.y;
        });
      }
    }
    for_pairs([&](int row, int n, float x, float y) {
      if (row >= routing.tokens || n >= a.y.columns) return;
      float2 scale = a.scale ? *reinterpret_cast<const float2*>(a.scale + n) : make_float2(1.f, 1.f);
      float2 bias = a.bias ? unpack<T>(*reinterpret_cast<const uint32_t*>(a.bias + n)) : make_float2(0.f, 0.f);
      if (a.scales_bias) bias = make_float2(scale.x * bias.x, scale.y * bias.y);
      *reinterpret_cast<uint32_t*>(a.y.data + tokens[row] * a.y.stride + n) =
          pack<T>(scale.x * x + bias.x, scale.y * y + bias.y);
    });
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

int64_t adapters_of(const FusedLayer& a) { return !a.lora_A ? 0 : a.lora_A->dim() == 3 ? a.lora_A->size(0) : 1; }

// At most as many tiles as any routing can need.
int most_tiles(const FusedLayer& a) {
  int64_t tokens = a.x.size(0);
  return static_cast<int>(tokens / kTile + std::min(adapters_of(a), tokens));
}

// Calls f<Cut>() with that of the layer. More columns for many tokens, if a block may have the shared memory: their rows
// of x are read anew for every item, from L2 and from shared memory.
template <class F>
void with_cut(const FusedLayer& a, F f) {
  using Wide = Cut<4, 128, 4>;
  using Narrow = Cut<4, 64, 3>;
  static_assert(FusedShared<Narrow>(kFusedRank, kFusedTokens / kTile + kFusedTokens).total <= kLeastShared);
  int64_t tokens = a.x.size(0);
  tokens <= 16   ? f.template operator()<Cut<1, 64, 5>>()
  : tokens <= 32 ? f.template operator()<Cut<2, 64, 5>>()
  : FusedShared<Wide>(a.rank(), most_tiles(a)).total <= shared_limit() ? f.template operator()<Wide>()
                                                                       : f.template operator()<Narrow>();
}

template <class T, class F>
void run(const FusedLayer& a, cudaStream_t stream) {
  int64_t tokens = a.x.size(0), k = a.x.size(1), n = a.weight.size(0), rank = a.rank();
  int64_t adapters = adapters_of(a);
  Rows s = rows_of(a.s, tokens, rank, "s");
  STD_TORCH_CHECK(!a.lora_A || (s && s.dtype == Dtype::f32), "s must be of the dtype of sums");
  OptionalTensor own;
  int* zeros = counters(a.x, stream, own);
  Routing routing{a.order ? integers(*a.order, tokens, "order") : nullptr,
                  a.segments ? integers(*a.segments, adapters + 1, "segments") : nullptr,
                  a.ranks ? integers(*a.ranks, adapters, "ranks") : nullptr,
                  static_cast<int>(adapters),
                  static_cast<int>(rank),
                  static_cast<int>(tokens)};
  int tiles = most_tiles(a);
  auto sized = [&]<class Cut, int count>() {
    constexpr int rows = Cut::kRows, kColumns = Cut::kColumns;
    int64_t column_items = (n + kColumns - 1) / kColumns, steps = (k + kDepth - 1) / kDepth;
    int64_t parts = std::clamp<int64_t>(kWanted / column_items, 1, std::clamp<int64_t>(steps / 8, 1, 8));
    ShrinkItems shrinks(routing.rank, k, count);
    Tensor shrink_planes = scratch(a.x, {shrinks.parts, tokens, rank}, ScalarType::Float);
    Tensor base_planes = scratch(a.x, {parts - 1, rows, column_items * kColumns}, ScalarType::Float);
    Layer<T, F> layer{{static_cast<const T*>(a.x.const_data_ptr()), a.x.stride(0), static_cast<int>(k)},
                      static_cast<const T*>(a.weight.const_data_ptr()),
                      a.weight.stride(0),
                      a.bias ? static_cast<const T*>(a.bias->const_data_ptr()) : nullptr,
                      a.scale ? sums<float>(*a.scale, {n}, "scale") : nullptr,
                      a.scales_bias,
                      a.lora_A ? static_cast<const F*>(a.lora_A->const_data_ptr()) : nullptr,
                      a.lora_B ? static_cast<const F*>(a.lora_B->const_data_ptr()) : nullptr,
                      static_cast<float>(a.scaling),
                      a.scalings ? sums<float>(*a.scalings, {adapters}, "scaling") : nullptr,
                      routing,
                      {static_cast<T*>(a.y.mutable_data_ptr()), a.y.stride(0), static_cast<int>(n)},
                      reinterpret_cast<float*>(s.data),
                      s.stride,
                      static_cast<float*>(shrink_planes.mutable_data_ptr()),
                      static_cast<float*>(base_planes.mutable_data_ptr()),
                      static_cast<int>(parts)};
    size_t shared = FusedShared<Cut>(routing.rank, tiles).total;
    auto kernel = fused_kernel<T, F, Cut, count>;
    int64_t blocks =
        std::min(tiles * shrinks.of_tile() + column_items * parts, resident_blocks(kernel, kThreads, shared));
    launch(kernel, dim3(blocks), dim3(kThreads), shared, stream, layer, zeros, tiles);
  };
  // As many bytes of lora_A, whatever its dtype: those of 32 ranks at most, or of 16 in float32.
  with_cut(a, [&]<class Cut>() {
    if constexpr (std::is_same_v<T, F>)
      if (rank > 16) return sized.template operator()<Cut, 4>();
    sized.template operator()<Cut, 2>();
  });
}

}  // namespace

bool takes(const FusedLayer& a) {
  int64_t tokens = a.x.size(0), k = a.x.size(1), n = a.weight.size(0), rank = a.rank();
  Dtype dtype = dtype_of(a.x, "x");
  Dtype adapters = a.lora_A ? dtype_of(*a.lora_A, "lora_A") : dtype;
  auto same = [&](const OptionalTensor& t) { return !t || dtype_of(*t, "tensor") == dtype; };
  auto whole = [](const OptionalTensor& t) { return !t || (t->is_contiguous() && aligned(t->const_data_ptr())); };
  return item_size(dtype) == 2 && same(a.weight) && same(a.y) && same(a.bias) &&
         (adapters == dtype || adapters == Dtype::f32) && (!a.lora_B || dtype_of(*a.lora_B, "lora_B") == adapters) &&
         tokens > 0 && tokens <= kFusedTokens && k % 8 == 0 && n % 8 == 0 && rank * item_size(adapters) % 16 == 0 &&
         rank <= kFusedRank && bool(a.lora_A) == (rank > 0) && in_runs(a.x, k) && in_runs(a.weight, k) &&
         in_runs(a.y, n) && whole(a.lora_A) && whole(a.lora_B) && whole(a.bias) && whole(a.scale);
}

void fused_layer(const FusedLayer& a, cudaStream_t stream) {
  auto typed = [&]<class T>(T) {
    a.lora_A && a.lora_A->scalar_type() == ScalarType::Float ? run<T, float>(a, stream) : run<T, T>(a, stream);
  };
  dtype_of(a.x, "x") == Dtype::bf16 ? typed(__nv_bfloat16{}) : typed(__half{});
}

}  // namespace pyfastpeft
