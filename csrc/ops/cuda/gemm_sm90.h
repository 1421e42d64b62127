// The product of gemm.h on CUTLASS's Hopper collectives. gemm_sm90.cu compiles the four kernels.
#pragma once
#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "ops/cuda/gemm.h"

namespace pyfastpeft {

// A collective whose sum runs over the depths of some products, then over the rank of another one of the same shape: the
// producer turns to the next one's operands when one's tiles are loaded. Of the very last of these tiles the consumers
// multiply no more than the rank fills.
template <class Single>
struct WithTail : Single {
  struct Arguments {
    typename Single::Arguments products[kProducts], tail;
    int depths[kProducts], rank, tails;  // 0: none
    const int* tail_of_block;
  };

  // With values, since CUTLASS's headers make it an error where some are missing in braces.
  struct Params : Single::Params {  // of the first product
    typename Single::Params others[kProducts - 1] = {}, tail = {};
    int tiles[kProducts] = {}, base_tiles = 0, rank = 0, blocks = 0;  // base_tiles: the sum of tiles
    const int* tail_of_block = nullptr;

    CUTLASS_HOST_DEVICE const typename Single::Params& product(int i) const { return i ? others[i - 1] : *this; }
  };

  static constexpr int kDepth = cute::size<2>(typename Single::TileShape{});
  static constexpr int kClusterTiles = cute::size<0>(typename Single::DispatchPolicy::ClusterShape{});
  // The tiles of a cluster share what they read of the right operand.
  static_assert(kClusterTiles * cute::size<0>(typename Single::TileShape{}) == kTailBlock);

  static int tiles(int depth) { return (depth + kDepth - 1) / kDepth; }

  template <class Shape>
  static Params to_underlying_arguments(const Shape& shape, const Arguments& it, void* workspace) {
    auto [rows, columns, unused, batch] = shape;
    auto described = [&](int depth, int batches, const typename Single::Arguments& operands) {
      return Single::to_underlying_arguments(cute::make_shape(rows, columns, depth, batches), operands, workspace);
    };
    Params params{described(it.depths[0], batch, it.products[0])};
    params.tail = it.rank ? described(it.rank, it.tails, it.tail) : params.product(0);
    for (int i = 0; i < kProducts; ++i) {
      if (i) params.others[i - 1] = it.depths[i] ? described(it.depths[i], batch, it.products[i]) : params.product(0);
      params.base_tiles += params.tiles[i] = tiles(it.depths[i]);
    }
    params.rank = it.rank;
    params.blocks = (rows + kTailBlock - 1) / kTailBlock;
    params.tail_of_block = it.tail_of_block;
    return params;
  }

  CUTLASS_DEVICE static void prefetch_tma_descriptors(const Params& params) {
    for (int i = 0; i < kProducts; ++i)
      if (params.tiles[i]) Single::prefetch_tma_descriptors(params.product(i));
    Single::prefetch_tma_descriptors(params.tail);
  }

  template <class Shape>
  CUTLASS_DEVICE auto load_init(const Shape& shape, const Params& params) const {
    auto base = Single::load_init(shape, params), tail = Single::load_init(shape, params.tail);
    return cute::make_tuple(cute::get<0>(base), cute::get<1>(base), cute::get<0>(tail), cute::get<1>(tail));
  }

  // The scheduler hands out whole tiles of the output, so that `tile` begins at 0. It also hands out tiles beyond the
  // last row, of which nothing is stored. The right operands of the tail are batches of one tensor: coordinates in it
  // move on to the batch of the block, those in the left operand stay in the first. TMA reads zeros where there is no
  // such batch.
  template <class Inputs, class Coordinates, class Iterator>
  CUTLASS_DEVICE void load(const Params& params, typename Single::MainloopPipeline pipeline,
                           typename Single::PipelineState state, const Inputs& inputs, const Coordinates& block,
                           Iterator tile, int tiles, int thread, uint32_t rank_in_cluster,
                           typename Single::TensorStorage& shared) {
    int number = cute::min(cute::get<0>(block) / kClusterTiles, params.blocks - 1);
    int batch = params.tail_of_block ? params.tail_of_block[number] : 0;
    auto to_batch = cute::make_coord(cute::_0{}, cute::_0{}, cute::_0{}, cute::_0{}, batch);  // of (N, K, n, k, l)
    auto base = cute::make_tuple(cute::get<0>(inputs), cute::get<1>(inputs));
    auto tail = cute::make_tuple(cute::get<2>(inputs), cute::domain_offset(to_batch, cute::get<3>(inputs)));
    CUTLASS_PRAGMA_NO_UNROLL
    for (int i = 0; i < kProducts && params.tiles[i]; ++i) {
      Single::load(params.product(i), pipeline, state, base, block, tile, params.tiles[i], thread, rank_in_cluster,
                   shared);
      state.advance(params.tiles[i]);
    }
    Single::load(params.tail, pipeline, state, tail, block, tile, tiles - params.base_tiles, thread, rank_in_cluster,
                 shared);
  }

  // As the base's mma, this leaves one product in flight and its tile to mma_tail.
  template <class Sums>
  CUTLASS_DEVICE void mma(typename Single::MainloopPipeline pipeline, typename Single::PipelineState state, Sums& sums,
                          int tiles, int thread, typename Single::TensorStorage& shared, const Params& params) {
    Single::mma(pipeline, state, sums, params.base_tiles, thread, shared, params);
    auto in_flight = state;
    in_flight.advance(params.base_tiles - 1);
    state.advance(params.base_tiles);
    auto of_stages = [](auto& elements, auto layout) {
      return cute::make_tensor(cute::make_smem_ptr(elements.data()), layout);
    };
    typename Single::TiledMma product;
    auto of_group = product.get_slice(__shfl_sync(~0u, thread / 128, 0) * 128);
    auto left = of_group.make_fragment_A(
        of_group.partition_A(of_stages(shared.smem_A, typename Single::SmemLayoutA{})));
    auto right = of_group.make_fragment_B(
        of_group.partition_B(of_stages(shared.smem_B, typename Single::SmemLayoutB{})));
    product.accumulate_ = cute::GMMA::ScaleOut::One;
    // By straight code for each number of steps: a branch within one product would end it.
    auto multiply = [&](auto steps) {
      cute::warpgroup_arrive();
      CUTLASS_PRAGMA_UNROLL
      for (int step = 0; step < steps; ++step)
        cute::gemm(product, left(cute::_, cute::_, step, state.index()), right(cute::_, cute::_, step, state.index()),
                   sums);
      cute::warpgroup_commit_batch();
      cute::warpgroup_wait<1>();
    };
    constexpr int kSteps = cute::size<2>(left), kStep = kDepth / kSteps;
    static_assert(kSteps == 4);
    for (int rank = params.rank; tiles > params.base_tiles; --tiles, rank -= kDepth) {
      pipeline.consumer_wait(state, pipeline.consumer_try_wait(state));
      cute::warpgroup_fence_operand(sums);
      rank <= kStep       ? multiply(cute::_1{})
      : rank <= 2 * kStep ? multiply(cute::_2{})
                          : multiply(cute::_4{});
      cute::warpgroup_fence_operand(sums);
      pipeline.consumer_release(in_flight);
      ++state;
      ++in_flight;
    }
  }
};

// The types of one kernel: tiles of 128 x 256 in clusters of two, which share what they read of `right`.
template <class Element, bool kBackward>
struct HopperGemm {
  using Tile = cute::Shape<cute::_128, cute::Int<kTileColumns>, cute::_64>;
  using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;
  using RowMajor = cutlass::layout::RowMajor;
  using Right = cute::conditional_t<kBackward, RowMajor, cutlass::layout::ColumnMajor>;

  // scale[n] * (sum + scaled_bias[n]) + bias[n], rounded once
  template <class Vector>
  using PerColumn = cutlass::epilogue::fusion::Sm90RowBroadcast<0, Tile, Vector, float>;
  template <template <class> class Function, class Out>
  using Compute = cutlass::epilogue::fusion::Sm90Compute<Function, Out, float,
                                                         cutlass::FloatRoundStyle::round_to_nearest>;
  using Shifted = cutlass::epilogue::fusion::Sm90EVT<Compute<cutlass::plus, float>,
                                                     cutlass::epilogue::fusion::Sm90AccFetch, PerColumn<Element>>;
  using Finish = cutlass::epilogue::fusion::Sm90EVT<Compute<cutlass::homogeneous_multiply_add, Element>,
                                                    PerColumn<float>, Shifted, PerColumn<Element>>;

  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, RowMajor, 8, Element, RowMajor, 8,
      cutlass::epilogue::TmaWarpSpecializedCooperative, Finish>::CollectiveOp;
  using Single = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, RowMajor, 8, Element, Right, 8, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;
  using Kernel =
      cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, WithTail<Single>, Epilogue>;
  using Device = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  // Of matrices whose unit stride is where its type says, `apart` from one to the next.
  template <class Stride>
  static Stride strides(int64_t distance, int64_t apart = 0) {
    Stride stride{};
    cute::get<cute::is_constant<1, decltype(cute::get<0>(Stride{}))>::value ? 1 : 0>(stride) = distance;
    cute::get<2>(stride) = apart;
    return stride;
  }

  static typename Device::Arguments arguments(const Gemm& gemm) {
    // Every left operand but the first is one that nobody reads: it only has to be one that TMA can describe.
    auto operands = [](const void* left, int64_t left_stride, const void* right, int64_t right_stride, int64_t apart) {
      return typename Single::Arguments{
          static_cast<const Element*>(left), strides<typename Single::StrideA>(left_stride, left_stride),
          static_cast<const Element*>(right), strides<typename Single::StrideB>(right_stride, apart)};
    };
    using Mainloop = WithTail<Single>;
    int rank = static_cast<int>(gemm.rank), tiles = Mainloop::tiles(rank);
    typename Device::Arguments it{};
    it.mainloop.tail = operands(gemm.tail_left, gemm.tail_left_stride, gemm.tail_right, gemm.tail_right_stride,
                                gemm.tail_right_distance);
    for (int i = 0; i < kProducts; ++i) {
      const Gemm::Product& product = gemm.products[i];
      it.mainloop.products[i] = operands(product.left, product.left_stride, product.right, product.right_stride, 0);
      it.mainloop.depths[i] = static_cast<int>(product.depth);
      tiles += Mainloop::tiles(it.mainloop.depths[i]);
    }
    it.mainloop.rank = rank;
    it.mainloop.tails = static_cast<int>(gemm.tails);
    it.mainloop.tail_of_block = gemm.tail_of_block;
    it.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    it.problem_shape = {static_cast<int>(gemm.rows), static_cast<int>(gemm.columns), tiles * Mainloop::kDepth, 1};
    auto per_column = [](const void* vector) {
      return typename PerColumn<Element>::Arguments{static_cast<const Element*>(vector), Element(0.0f)};
    };
    it.epilogue.thread = {{gemm.scale, 1.0f}, {{}, per_column(gemm.scaled_bias), {}}, per_column(gemm.bias), {}};
    it.epilogue.ptr_D = static_cast<Element*>(gemm.out);
    it.epilogue.dD = strides<typename Kernel::StrideD>(gemm.out_stride);
    it.scheduler.max_swizzle_size = 8;  // neighbours in time share rows and columns, which then stay in L2
    return it;
  }
};

template <bool kBfloat16, bool kBackward>
const char* hopper_gemm(const Gemm& gemm, cudaStream_t stream) {
  using Types = HopperGemm<cute::conditional_t<kBfloat16, cutlass::bfloat16_t, cutlass::half_t>, kBackward>;
  static_assert(Types::Kernel::SharedStorageSize <= 227 * 1024);  // what a block of sm_90 may have
  static_assert(sizeof(typename Types::Kernel::Params) <= 4096);  // what every driver takes along with a launch
  typename Types::Device device;
  cutlass::Status status = device.initialize(Types::arguments(gemm), nullptr, stream);
  if (status == cutlass::Status::kSuccess) status = device.run(stream);
  return status == cutlass::Status::kSuccess ? nullptr : cutlassGetStatusString(status);
}

}  // namespace pyfastpeft
