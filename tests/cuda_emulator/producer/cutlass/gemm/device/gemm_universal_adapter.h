// Stands for CUTLASS's header of this name, which only nvcc can read.
#pragma once

namespace cutlass::gemm::device {

template <class Kernel>
struct GemmUniversalAdapter {
  using Arguments = typename Kernel::Arguments;
};

}  // namespace cutlass::gemm::device
