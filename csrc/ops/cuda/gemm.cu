#include "ops/cuda/gemm.h"

namespace pyfastpeft {

#ifdef PYFASTPEFT_CUTLASS

bool gemm_pays(int64_t rows, int64_t columns) {
  int device = 0, major = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) cudaGetLastError();
  int64_t tiles = (rows + kTailBlock - 1) / kTailBlock * 2 * ((columns + kTileColumns - 1) / kTileColumns);
  return major == 9 && 4 * tiles >= 3 * multiprocessors;
}

const char* gemm(const Gemm& it, cudaStream_t stream) {
  if (it.bfloat16) return it.backward ? hopper_gemm<true, true>(it, stream) : hopper_gemm<true, false>(it, stream);
  return it.backward ? hopper_gemm<false, true>(it, stream) : hopper_gemm<false, false>(it, stream);
}

#else

bool gemm_pays(int64_t, int64_t) { return false; }

const char* gemm(const Gemm&, cudaStream_t) { return "this library was built without CUTLASS"; }

#endif

}  // namespace pyfastpeft
