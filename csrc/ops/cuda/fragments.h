// Operands of mma straight from rows in memory, without shared memory between.
//
// A sum does not care in which order its terms come, so the terms are dealt to lanes in runs: lane t of four takes
// consecutive elements of a row where mma would have it take pairs far apart, in both operands alike. In the same way
// the columns of the result are dealt so that a lane gets consecutive ones. Below g = lane / 4, t = lane % 4.
#pragma once
#include "ops/cuda/exact.h"

namespace pyfastpeft {

// The first `valid` of eight elements at `from`, zeros for the rest; `vector`: all or none are valid, at a multiple of
// 16 bytes.
template <class T, bool vector>
__device__ __forceinline__ uint4 load8(const T* from, int valid) {
  if constexpr (vector) {
    return valid > 0 ? *reinterpret_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
  } else {
    auto* bits = reinterpret_cast<const uint16_t*>(from);
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t low = 2 * i < valid ? bits[2 * i] : 0, high = 2 * i + 1 < valid ? bits[2 * i + 1] : 0;
      words[i] = low | high << 16;
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// The first `valid` of four elements at `from`, zeros for the rest; `vector`: `from` is a multiple of 8 bytes and all
// four may be read.
template <class T, bool vector>
__device__ __forceinline__ uint2 load4(const T* from, int valid) {
  if constexpr (vector) {
    uint2 words = valid > 0 ? *reinterpret_cast<const uint2*>(from) : make_uint2(0, 0);
    if (valid < 4) words.y = valid < 3 ? 0 : words.y & 0xffff;
    if (valid < 2) words.x &= 0xffff;
    return words;
  } else {
    auto* bits = reinterpret_cast<const uint16_t*>(from);
    uint32_t e[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) e[i] = i < valid ? bits[i] : 0;
    return make_uint2(e[0] | e[1] << 16, e[2] | e[3] << 16);
  }
}

// The same of float32 numbers, rounded to T; `vector`: `from` is a multiple of 16 bytes.
template <class T, bool vector>
__device__ __forceinline__ uint2 load4(const float* from, int valid) {
  float e[4];
  if constexpr (vector) {
    float4 four = valid > 0 ? *reinterpret_cast<const float4*>(from) : make_float4(0, 0, 0, 0);
    e[0] = four.x, e[1] = four.y, e[2] = four.z, e[3] = four.w;
#pragma unroll
    for (int i = 1; i < 4; ++i) e[i] = i < valid ? e[i] : 0.f;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) e[i] = i < valid ? from[i] : 0.f;
  }
  return make_uint2(pack<T>(e[0], e[1]), pack<T>(e[2], e[3]));
}

// The first `valid` of eight float32 numbers at `from`, zeros for the rest; `vector`: all or none are valid, at a
// multiple of 16 bytes.
template <bool vector>
__device__ __forceinline__ void load8(float (&e)[8], const float* from, int valid) {
  if constexpr (vector) {
    auto* fours = reinterpret_cast<const float4*>(from);
    float4 low = make_float4(0, 0, 0, 0), high = low;
    if (valid > 0) low = fours[0], high = fours[1];
    e[0] = low.x, e[1] = low.y, e[2] = low.z, e[3] = low.w;
    e[4] = high.x, e[5] = high.y, e[6] = high.z, e[7] = high.w;
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) e[i] = i < valid ? from[i] : 0.f;
  }
}

// d[q] += left right[q]^T over 32 terms, of which this lane holds those from 8t on: left rows g and g + 8, right row g.
template <class T, int count>
__device__ __forceinline__ void multiply32(float (&d)[count][4], uint4 upper, uint4 lower,
                                           const uint4 (&right)[count]) {
  uint32_t first[] = {upper.x, lower.x, upper.y, lower.y}, second[] = {upper.z, lower.z, upper.w, lower.w};
#pragma unroll
  for (int q = 0; q < count; ++q) {
    uint32_t b[] = {right[q].x, right[q].y};
    mma<T>(d[q], first, b);
  }
#pragma unroll
  for (int q = 0; q < count; ++q) {
    uint32_t b[] = {right[q].z, right[q].w};
    mma<T>(d[q], second, b);
  }
}

// d += left right^T over the same 32 terms, right in float32.
template <class T>
__device__ __forceinline__ void multiply32_exact(float (&d)[4], uint4 upper, uint4 lower, const float (&right)[8]) {
  uint32_t above[] = {upper.x, upper.y, upper.z, upper.w}, below[] = {lower.x, lower.y, lower.z, lower.w};
  float sum[4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float2 first = unpack<T>(above[i]), second = unpack<T>(below[i]);
    mma_exact(sum, {first.x, second.x, first.y, second.y}, {right[2 * i], right[2 * i + 1]}, false);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) d[i] += sum[i];
}

// As multiply32 over 16 terms, of which this lane holds those from 4t on.
template <class T, int count>
__device__ __forceinline__ void multiply16(float (&d)[count][4], uint2 upper, uint2 lower,
                                           const uint2 (&right)[count]) {
  uint32_t left[] = {upper.x, lower.x, upper.y, lower.y};
#pragma unroll
  for (int q = 0; q < count; ++q) {
    uint32_t b[] = {right[q].x, right[q].y};
    mma<T>(d[q], left, b);
  }
}

// Which of 32 consecutive rows this lane brings as row g of right[q], q < 4, so that in d[0 .. 4] it gets of every row
// of the left the eight consecutive columns from 8t on: columns 8t + 2q and the next are d[q][0], d[q][1] (row g),
// d[q][2], d[q][3] (row g + 8).
__device__ __forceinline__ int dealt_row(int g, int q) { return g / 2 * 8 + q * 2 + g % 2; }

}  // namespace pyfastpeft
