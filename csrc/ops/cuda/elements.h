// Elements in global memory: 16 bytes at a time where rows allow it, else one by one; wide in registers.
#pragma once
#include <cstring>

#include "ops/checks.h"
#include "ops/cuda/intrinsics.h"

namespace pyfastpeft {

// The dtype of sums.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
constexpr bool kShort = sizeof(T) == 2;

// `size` consecutive elements of T as numbers of type Wide<T>.
template <class T, bool vector>
struct Run {
  static constexpr int size = vector ? 16 / sizeof(T) : 1;
  using C = Wide<T>;

  C of[size];

  __device__ __forceinline__ static Run load(const T* from) {
    Run run;
    if constexpr (!vector) {
      run.of[0] = static_cast<C>(*from);
    } else {
      uint4 bits = *reinterpret_cast<const uint4*>(from);
      uint32_t words[] = {bits.x, bits.y, bits.z, bits.w};
      if constexpr (kShort<T>) {
        for (int i = 0; i < 4; ++i) {
          float2 pair = unpack<T>(words[i]);
          run.of[2 * i] = pair.x;
          run.of[2 * i + 1] = pair.y;
        }
      } else {
        memcpy(run.of, words, 16);
      }
    }
    return run;
  }

  __device__ __forceinline__ void store(T* to) const {
    if constexpr (!vector) {
      *to = static_cast<T>(of[0]);
    } else {
      uint32_t words[4];
      if constexpr (kShort<T>) {
        for (int i = 0; i < 4; ++i) words[i] = pack<T>(of[2 * i], of[2 * i + 1]);
      } else {
        memcpy(words, of, 16);
      }
      store16(to, make_uint4(words[0], words[1], words[2], words[3]));
    }
  }
};

// Element i of an array of a dtype that is known when the kernel runs.
struct AnyFloats {
  const void* data;
  Dtype dtype;

  template <class C>
  __device__ __forceinline__ C at(int64_t i) const {
    switch (dtype) {
      case Dtype::f64:
        return static_cast<C>(static_cast<const double*>(data)[i]);
      case Dtype::f32:
        return static_cast<C>(static_cast<const float*>(data)[i]);
      case Dtype::bf16:
        return static_cast<C>(static_cast<float>(static_cast<const __nv_bfloat16*>(data)[i]));
      default:
        return static_cast<C>(static_cast<float>(static_cast<const __half*>(data)[i]));
    }
  }

  template <class C>
  __device__ __forceinline__ void put(int64_t i, C value) const {
    void* to = const_cast<void*>(data);
    switch (dtype) {
      case Dtype::f64:
        static_cast<double*>(to)[i] = static_cast<double>(value);
        break;
      case Dtype::f32:
        static_cast<float*>(to)[i] = static_cast<float>(value);
        break;
      case Dtype::bf16:
        static_cast<__nv_bfloat16*>(to)[i] = static_cast<__nv_bfloat16>(static_cast<float>(value));
        break;
      default:
        static_cast<__half*>(to)[i] = static_cast<__half>(static_cast<float>(value));
    }
  }
};

// Whether a run of 16 bytes may begin at any of its multiples in any row: always for an absent matrix.
inline bool in_runs(const Rows& rows, int64_t columns) {
  int64_t run = 16 / item_size(rows.dtype);
  return !rows || (reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.stride % run == 0 && columns % run == 0);
}

// Calls f with an element of the type that dtype names, as decltype.
template <class F>
void with_type(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::f64:
      return f(double{});
    case Dtype::f32:
      return f(float{});
    case Dtype::bf16:
      return f(__nv_bfloat16{});
    default:
      return f(__half{});
  }
}

}  // namespace pyfastpeft
