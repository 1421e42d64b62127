#include "ops/cuda/gemm_sm90.h"

template const char* pyfastpeft::hopper_gemm<true, true>(const Gemm&, cudaStream_t);
