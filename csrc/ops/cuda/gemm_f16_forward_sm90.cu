#include "ops/cuda/gemm_sm90.h"

template const char* pyfastpeft::hopper_gemm<false, false>(const Gemm&, cudaStream_t);
