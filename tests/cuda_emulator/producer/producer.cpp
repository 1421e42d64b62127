// The product in csrc/ops/cuda/gemm_sm90.h, with all of CUTLASS below it, on the CPU, as far as it goes there.
// Copies by TMA are made here, as their descriptors tell, into what would be the shared memory of a cluster. In every
// tile, the product of what lies there in the end has to be the formula in gemm.h. Of the consumers it is noted which
// parts of the tiles they multiply, between which orders. The program ends with 1 where anything is not as it should.
#include <cuda.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <cutlass/arch/wmma.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

// CUTLASS describes operands for TMA where nvcc compiles it.
#define __CUDACC_VER_MAJOR__ 13
#define __CUDACC_VER_MINOR__ 0
#define CUTLASS_ENABLE_DIRECT_CUDA_DRIVER_CALL

// What device code names beyond the language.
static uint3 threadIdx, blockIdx;
static dim3 blockDim, gridDim;
inline void __syncthreads() {}
inline int __shfl_sync(unsigned, int value, int) { return value; }
inline size_t __cvta_generic_to_shared(const void*);
#define CUTE_CVTA_GENERIC_TO_SHARED_ACTIVATED 1

// On a CPU, CUTLASS's functions for instructions end in this macro: here it makes the copy that TMA would make. The
// parameters have these names; where a function has none of such a name, it is not a copy of three dimensions.
static const void* desc_ptr;
static void* smem_ptr;
static uint16_t multicast_mask;
static int crd0, crd1, crd2;
template <class... Any>
void copy_tile(const Any&...) {}
void copy_tile(const void* const& descriptor, const uint16_t& blocks, void* const& to, const int& x, const int& y,
               const int& z);
#include <cute/config.hpp>
#undef CUTE_INVALID_CONTROL_PATH
#define CUTE_INVALID_CONTROL_PATH(_) copy_tile(desc_ptr, multicast_mask, smem_ptr, crd0, crd1, crd2)
#include <cute/arch/copy_sm90_tma.hpp>

// What the consumers order: "fma" of two operands by their descriptors, or a function without operands.
struct Order {
  const char* name;
  uint64_t left, right;
};
static std::vector<Order> orders;
static uint64_t desc_a, desc_b;
#undef CUTE_INVALID_CONTROL_PATH
#define CUTE_INVALID_CONTROL_PATH(_) orders.push_back({__func__, desc_a, desc_b})
#include <cute/arch/mma_sm90_gmma.hpp>
#undef CUTE_INVALID_CONTROL_PATH
#define CUTE_INVALID_CONTROL_PATH(_) std::abort()

#include "ops/cuda/gemm_sm90.h"

namespace {

using Element = cutlass::bfloat16_t;

constexpr int kBlocks = 2;  // of a cluster

struct Descriptor {
  const char* data;
  int64_t sizes[3], strides[3], box[3];  // strides in bytes
};

char* shared_memory[kBlocks];
size_t shared_size;
int running;  // the block that asks for copies

}  // namespace

inline size_t __cvta_generic_to_shared(const void* shared) {
  return static_cast<const char*>(shared) - shared_memory[running];
}

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* data,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  if (rank != 3 || swizzle != CU_TENSOR_MAP_SWIZZLE_128B || box[0] * sizeof(Element) != 128) std::abort();
  Descriptor it{static_cast<const char*>(data), {}, {sizeof(Element)}, {}};
  for (int i = 0; i < 3; ++i) it.sizes[i] = sizes[i], it.box[i] = box[i];
  for (int i = 1; i < 3; ++i) it.strides[i] = strides[i - 1];
  for (int64_t stride : it.strides)
    if (stride % 16 && stride != sizeof(Element)) std::abort();
  static_assert(sizeof it <= sizeof *map);
  std::memcpy(map, &it, sizeof it);
  return CUDA_SUCCESS;
}

// The box that begins at (x, y, z), zeros where it is outside of the tensor, to the blocks of a mask (0: the running
// one). Runs of 16 bytes change places in their 128.
void copy_tile(const void* const& descriptor, const uint16_t& blocks, void* const& to, const int& x, const int& y,
               const int& z) {
  Descriptor from;
  std::memcpy(&from, descriptor, sizeof from);
  size_t begin = static_cast<char*>(to) - shared_memory[running];
  for (int64_t i = 0; i < from.box[0] * from.box[1] * from.box[2]; ++i) {
    int64_t at[] = {x + i % from.box[0], y + i / from.box[0] % from.box[1], z + i / from.box[0] / from.box[1]};
    int64_t offset = 0;
    bool inside = true;
    for (int j = 0; j < 3; ++j) offset += at[j] * from.strides[j], inside &= at[j] >= 0 && at[j] < from.sizes[j];
    Element value = inside ? *reinterpret_cast<const Element*>(from.data + offset) : Element(0.f);
    size_t position = begin + i * sizeof(Element);
    position ^= position >> 3 & 0x70;
    if (position >= shared_size) std::abort();
    for (int block = 0; block < kBlocks; ++block)
      if ((blocks ? blocks : 1 << running) >> block & 1)
        std::memcpy(shared_memory[block] + position, &value, sizeof value);
  }
}

namespace {

// A matrix of small whole numbers in rows of `stride`, with NaN between them.
struct Matrix {
  int64_t stride;
  std::vector<Element> elements;

  Matrix(int64_t rows, int64_t columns, int64_t stride) : stride(stride), elements(rows * stride, Element(NAN)) {
    static unsigned state = 1;
    for (int64_t i = 0; i < rows * stride; ++i)
      if (i % stride < columns) elements[i] = Element(float((state = state * 1664525 + 1013904223) >> 24 & 7) - 3);
  }
  double at(int64_t row, int64_t column) const { return float(elements[row * stride + column]); }
};

// How many orders are not those of the mainloop: every tile is multiplied in four steps, but the last one only as far as
// the rank goes (or in one step more, of zeros); a step of the tail lies in its stage where one of the base lies in its.
long wrong_orders(int base_tiles, int tiles, int rank) {
  std::vector<Order> steps;
  std::string told, expected;
  for (const Order& order : orders) {
    told += order.name[0] == 'f' ? 'f' : order.name[std::strlen("warpgroup_")];  // fma, arrive, commit_batch, wait
    if (order.name[0] == 'f') steps.push_back(order);
  }
  for (int tile = 0; tile < tiles; ++tile) {
    int left = tile < base_tiles ? 64 : rank - 64 * (tile - base_tiles), count = left <= 16 ? 1 : left <= 32 ? 2 : 4;
    expected += "a" + std::string(count, 'f') + (tile ? "cw" : "c");
  }
  long wrong = told != expected;
  auto begin = [](uint64_t descriptor) { return long(descriptor & 0x3fff) * 16; };
  auto distance = [&](int from, int to, uint64_t Order::*side) { return begin(steps[to].*side) - begin(steps[from].*side); };
  for (size_t i = 4 * base_tiles; i < steps.size(); ++i)
    for (auto side : {&Order::left, &Order::right})
      wrong += distance(0, i, side) != distance(0, 4, side) * long(i / 4) + distance(0, i % 4, side);
  return wrong;
}

// How much of the sum of products of these depths is wrong, with an adapter for every block of rows or, without them, one
// for all.
template <bool kBackward>
long wrong(const std::vector<int64_t>& depths, const int* tail_of_block, int64_t r) {
  using Types = pyfastpeft::HopperGemm<Element, kBackward>;
  using Mainloop = pyfastpeft::WithTail<typename Types::Single>;
  using Pipeline = typename Mainloop::MainloopPipeline;
  constexpr int64_t m = 600, n = 264, adapters = 4;
  auto right_of = [](int64_t depth, int64_t stride) {
    return kBackward ? Matrix(depth, n, stride) : Matrix(n, depth, stride);
  };
  auto at = [](const Matrix& right, int64_t j, int64_t column) {
    return kBackward ? right.at(j, column) : right.at(column, j);
  };
  Matrix tail_left(m, r, (r + 7) / 8 * 8 + 8);
  std::vector<Matrix> lefts_of, rights_of, tails;  // lefts and rights of products
  std::vector<Element> tail_elements;
  for (int a = 0; a < adapters; ++a) {
    tails.push_back(right_of(r, 264));
    if (a == 2) std::fill(tails[a].elements.begin(), tails[a].elements.end(), Element(NAN));  // nobody's
    tail_elements.insert(tail_elements.end(), tails[a].elements.begin(), tails[a].elements.end());
  }
  pyfastpeft::Gemm gemm{.backward = kBackward, .rows = m, .columns = n, .rank = r, .products = {}};
  for (size_t i = 0; i < depths.size(); ++i) {
    lefts_of.emplace_back(m, depths[i], depths[i] + 16), rights_of.push_back(right_of(depths[i], 280 + 8 * i));
    gemm.products[i] = {depths[i], lefts_of[i].elements.data(), rights_of[i].elements.data(), lefts_of[i].stride,
                        rights_of[i].stride};
  }
  gemm.tail_left = tail_left.elements.data(), gemm.tail_left_stride = tail_left.stride;
  gemm.tail_right = tail_elements.data(), gemm.tail_right_stride = tails[0].stride;
  gemm.tail_of_block = tail_of_block, gemm.tails = adapters, gemm.tail_right_distance = tails[0].elements.size();

  auto arguments = Types::arguments(gemm);
  auto params = Mainloop::to_underlying_arguments(arguments.problem_shape, arguments.mainloop, nullptr);
  int depth = cute::get<2>(arguments.problem_shape), tiles = depth / Mainloop::kDepth;
  if (tiles > Mainloop::DispatchPolicy::Stages) std::abort();
  struct alignas(1024) Shared {
    typename Mainloop::TensorStorage tensors;
  };
  std::vector<Shared> shared(kBlocks);
  shared_size = sizeof(Shared);
  for (int block = 0; block < kBlocks; ++block) shared_memory[block] = reinterpret_cast<char*>(&shared[block]);
  Mainloop mainloop;
  auto inputs = mainloop.load_init(arguments.problem_shape, params);
  long count = 0;
  for (int64_t cluster = 0; cluster < 4; ++cluster)  // one more than there are rows for
    for (int64_t column = 0; column < 2; ++column) {
      std::memset(static_cast<void*>(shared.data()), 0xff, kBlocks * shared_size);
      for (running = 0; running < kBlocks; ++running) {
        typename Pipeline::Params of_pipeline{};
        alignas(128) char barriers[sizeof(typename Pipeline::SharedStorage)];
        Pipeline pipeline(*reinterpret_cast<typename Pipeline::SharedStorage*>(barriers), of_pipeline,
                          typename Types::Cluster{}, cute::false_type{}, cute::false_type{});
        mainloop.load(params, pipeline, typename Mainloop::PipelineState{}, inputs,
                      cute::make_coord(int(kBlocks * cluster + running), int(column), cute::_, 0),
                      cute::make_coord_iterator(tiles), tiles, 0, running, shared[running].tensors);
        typename Mainloop::TiledMma product;
        auto sums = cute::partition_fragment_C(product, cute::take<0, 2>(typename Types::Tile{}));
        for (int thread : {0, 128}) {
          orders.clear();
          mainloop.mma(pipeline, typename Mainloop::PipelineState{}, sums, tiles, thread, shared[running].tensors, params);
          count += wrong_orders(params.base_tiles, tiles, r);
        }
      }
      for (int block = 0; block < kBlocks; ++block) {
        auto& tensors = shared[block].tensors;
        auto a = cute::make_tensor(cute::make_smem_ptr(tensors.smem_A.data()), typename Mainloop::SmemLayoutA{});
        auto b = cute::make_tensor(cute::make_smem_ptr(tensors.smem_B.data()), typename Mainloop::SmemLayoutB{});
        constexpr int rows = cute::size<0>(a.layout()), columns = cute::size<0>(b.layout());
        std::vector<float> lefts(rows * depth), rights(columns * depth);
        auto flat = [&](auto tile, std::vector<float>& to) {
          for (int i = 0; i < int(to.size()); ++i)
            to[i] = float(tile(i / depth, i % depth % Mainloop::kDepth, i % depth / Mainloop::kDepth));
        };
        flat(a, lefts), flat(b, rights);
        for (int i = 0; i < rows * columns; ++i) {
          int64_t row = (kBlocks * cluster + block) * rows + i / columns, to = column * columns + i % columns;
          float sum = 0;
          for (int j = 0; j < depth; ++j) sum += lefts[i / columns * depth + j] * rights[i % columns * depth + j];
          double expected = 0;
          if (row < m && to < n) {
            int tail = tail_of_block ? tail_of_block[row / pyfastpeft::kTailBlock] : 0;
            for (size_t p = 0; p < depths.size(); ++p)
              for (int64_t j = 0; j < depths[p]; ++j) expected += lefts_of[p].at(row, j) * at(rights_of[p], j, to);
            for (int64_t j = 0; j < r && tail >= 0; ++j) expected += tail_left.at(row, j) * at(tails[tail], j, to);
          }
          count += sum != expected;  // NaN counts, too
        }
      }
    }
  return count;
}

}  // namespace

int main() {
  int tail_of_block[] = {3, -1, 1};
  long all = 0;
  struct {
    std::vector<int64_t> depths;
    int rank;
  } cases[] = {{{72}, 100}, {{72}, 90}, {{72}, 72}, {{72}, 8}, {{24, 72}, 24}, {{64, 8, 40}, 40}, {{16, 72, 24}, 0}};
  for (const auto& [depths, rank] : cases)
    for (const int* tails : {static_cast<const int*>(nullptr), static_cast<const int*>(tail_of_block)}) {
      long forward = wrong<false>(depths, tails, rank), backward = wrong<true>(depths, tails, rank);
      std::printf("%zu products, rank %d%s, wrong: forward %ld, backward %ld\n", depths.size(), rank,
                  tails ? " by block" : "", forward, backward);
      all += forward + backward;
    }
  return all > 0;
}
