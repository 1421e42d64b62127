#include "ops/cuda/gemm.h"

namespace pyfastpeft {

#ifdef PYFASTPEFT_CUTLASS

bool gemm_available() {
  int device = 0, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) cudaGetLastError();
  return major == 9;
}

const char* gemm(const Gemm& it, cudaStream_t stream) {
  if (it.bfloat16) return it.backward ? hopper_gemm<true, true>(it, stream) : hopper_gemm<true, false>(it, stream);
  return it.backward ? hopper_gemm<false, true>(it, stream) : hopper_gemm<false, false>(it, stream);
}

#else

bool gemm_available() { return false; }

const char* gemm(const Gemm&, cudaStream_t) { return "this library was built without CUTLASS"; }

#endif

}  // namespace pyfastpeft
