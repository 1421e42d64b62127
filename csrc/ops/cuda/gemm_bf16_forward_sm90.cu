#include "ops/cuda/gemm_sm90.h"

template const char* pyfastpeft::hopper_gemm<true, false>(const Gemm&, cudaStream_t);
