// Dropout whose mask is never stored: reference.dropout_factor's bits.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace pyfastpeft {

// Element (m, k) is kept, and multiplied by `keep`, iff word k mod 4 of philox(k / 4, m) is at least drop_below.
struct Dropout {
  const int64_t* seed = nullptr;  // [1], on the device; null: everything is kept
  uint32_t drop_below = 0;
  float keep = 1.0f;
};

// Philox4x32-10 (Salmon et al. 2011) of the counter (quad, row, 0, 0) under the key `seed`.
__device__ __forceinline__ uint4 philox(uint64_t seed, uint32_t quad, uint32_t row) {
  uint32_t c0 = quad, c1 = row, c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    uint64_t p0 = uint64_t(c0) * 0xD2511F53u, p1 = uint64_t(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return make_uint4(c0, c1, c2, c3);
}

// One bit for every one of eight neighbours in a row, from column on, a multiple of 8: set where it is kept.
__device__ __forceinline__ uint32_t kept_of_eight(const Dropout& dropout, uint64_t seed, int64_t row, int column) {
  uint32_t kept = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint4 bits = philox(seed, column / 4 + half, static_cast<uint32_t>(row));
    kept |= uint32_t(bits.x >= dropout.drop_below) << (4 * half) | uint32_t(bits.y >= dropout.drop_below) << (4 * half + 1) |
            uint32_t(bits.z >= dropout.drop_below) << (4 * half + 2) |
            uint32_t(bits.w >= dropout.drop_below) << (4 * half + 3);
  }
  return kept;
}

// Two 16-bit elements, each zero where its bit is not set.
__device__ __forceinline__ uint32_t keep_of_two(uint32_t pair, uint32_t bits) {
  return pair & ((bits & 1 ? 0xffffu : 0u) | (bits & 2 ? 0xffff0000u : 0u));
}

}  // namespace pyfastpeft
