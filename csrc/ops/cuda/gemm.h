// The matrix product that everything on Hopper stands on: base products and a low-rank tail in one accumulator. Blocks of
// rows may have tails of their own.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace pyfastpeft {

constexpr int kTailBlock = 256;    // rows that have the same tail_right
constexpr int kProducts = 3;       // base products in one accumulator, at most: those of query, key and value
constexpr int kTileColumns = 256;  // of out that a multiprocessor computes at a time, for half as many rows as that

// out[m, n] = scale[n] * (sum over products and k of left[m, k] right(k, n) + sum over j of tail_left[m, j]
// tail_right(a, j, n) + scaled_bias[n]) + bias[n], where a is tail_of_block[m / kTailBlock], or 0 without it. Of an a
// outside [0, tails) tail_right is zeros.
//
// All matrices are of one 16-bit dtype, sums are float32 and rounded once. Rows of left, tail_left and out are contiguous
// at the given strides (in elements); right and tail_right are contiguous along k and j (as weight [N, K] and lora_B
// [N, r] are in a forward pass) or, where `backward`, along n (as weight [K, N] and lora_A [r, N] are in a backward
// pass). Every stride is a multiple of 8, every pointer of 16 bytes: what TMA asks for. The sizes may be any; what lies
// between the end of a row and the next is not read. Needs no scratch memory.
struct Gemm {
  bool bfloat16 = true;  // else float16
  bool backward = false;
  int64_t rows = 0, columns = 0, rank = 0;  // M, N, r; rank 0: no tail
  struct Product {
    int64_t depth = 0;  // K; 0: there is none
    const void *left = nullptr, *right = nullptr;
    int64_t left_stride = 0, right_stride = 0;
  } products[kProducts];  // the first ones
  const void *tail_left = nullptr, *tail_right = nullptr;
  int64_t tail_left_stride = 0, tail_right_stride = 0;
  const int* tail_of_block = nullptr;  // [rows / kTailBlock, rounded up] or null, on the device
  int64_t tails = 1, tail_right_distance = 0;  // how many tail_right there are, and elements from one to the next
  const float* scale = nullptr;                          // [N] or null: 1
  const void *scaled_bias = nullptr, *bias = nullptr;    // [N], of the matrices' dtype, or null: 0
  void* out = nullptr;
  int64_t out_stride = 0;
};

// Whether this library holds the product and the current device can run it (sm_90), with tiles of an out of this size
// for at least three quarters of its multiprocessors: with fewer, torch's product, whose tiles adapt, is faster.
bool gemm_pays(int64_t rows, int64_t columns);

// Null, or what went wrong.
const char* gemm(const Gemm&, cudaStream_t);

// The product in one dtype and one order of operands: of gemm_sm90.h.
template <bool kBfloat16, bool kBackward>
const char* hopper_gemm(const Gemm&, cudaStream_t);

}  // namespace pyfastpeft
