// All in one file, since nvcc spends most of its time on what they share.
#include "ops/cuda/gemm_sm90.h"

template const char* pyfastpeft::hopper_gemm<true, false>(const Gemm&, cudaStream_t);
template const char* pyfastpeft::hopper_gemm<true, true>(const Gemm&, cudaStream_t);
template const char* pyfastpeft::hopper_gemm<false, false>(const Gemm&, cudaStream_t);
template const char* pyfastpeft::hopper_gemm<false, true>(const Gemm&, cudaStream_t);
