// Stands for CUTLASS's header of this name, which only nvcc can read: the arguments of a kernel.
#pragma once
#include <cutlass/gemm/gemm.h>

namespace cutlass::gemm::kernel {

template <class ProblemShape, class Mainloop, class Epilogue>
struct GemmUniversal {
  using StrideD = typename Epilogue::StrideD;

  struct Arguments {
    GemmUniversalMode mode;
    ProblemShape problem_shape;
    typename Mainloop::Arguments mainloop;
    typename Epilogue::Arguments epilogue;
    struct {
      int max_swizzle_size;
    } scheduler;
  };
};

}  // namespace cutlass::gemm::kernel
