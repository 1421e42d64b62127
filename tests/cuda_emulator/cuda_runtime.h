// Runs the __global__ functions of csrc/ops/cuda on the CPU, for tests: g++ compiles the .cu sources with this folder
// first among its includes, and the ops are registered for CPU tensors in a namespace of their own (emulated_cuda.py).
//
// What it emulates: launches by cudaLaunchKernelEx, with as many blocks at once as PYFASTPEFT_EMULATED_SMS tells, so
// that blocks may wait for blocks that are resident; __syncthreads; warps whose lanes run apart until a warp operation
// brings them together (__syncwarp, shuffles, our mma and ldmatrix); integer atomics; asynchronous copies, made as late
// as a wait allows; dynamic shared memory, which holds NaN at first, as much as the kernel was allowed and a block of the
// device may have. Blocks, and threads in them, take turns in another order every round. intrinsics.h and device.h in
// ops/cuda stand for ours of these names. Threads that wait for each other, a lane that is not in its own mask, and
// asynchronous copies and matrices at addresses that are not aligned raise RuntimeError. Built with -fsanitize=thread it
// finds races (emulated_cuda.py tells how).
//
// What it cannot show: time; registers and spills; that other addresses are aligned and coalesced; how tensor cores round
// within a product; the memory model beyond races; wgmma, nor TMA (which producer/ shows). A __shared__ variable is one
// for all blocks here: kernels take dynamic shared memory where blocks wait for blocks.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <map>
#include <tuple>

#include "fibers.h"

// The ops are those of CPU tensors; nothing above is to see this name.
#define CUDA CPU

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#define CUDART_VERSION 0

struct dim3 : emulator::Triple {
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : Triple{x, y, z} {}
};

template <class, int>
struct Vector;
template <class T>
struct alignas(2 * sizeof(T)) Vector<T, 2> {
  T x, y;
};
template <class T>
struct alignas(4 * sizeof(T)) Vector<T, 4> {
  T x, y, z, w;
};
using uint2 = Vector<unsigned, 2>;
using uint4 = Vector<unsigned, 4>;
using float2 = Vector<float, 2>;
using float4 = Vector<float, 4>;
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// --- the runtime ---

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorNoDevice };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
struct cudaDeviceProp {
  int major, minor;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidValue ? "invalid argument" : "no device";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = emulator::device(), cudaSuccess; }
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp*, int) { return cudaErrorNoDevice; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount            ? emulator::multiprocessors()
           : attribute == cudaDevAttrComputeCapabilityMajor       ? emulator::capability()
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? emulator::shared_limit()
                                                                  : 0;
  return cudaSuccess;
}
namespace emulator {

// Bytes of dynamic shared memory that a kernel may have.
inline int& allowed_shared(const void* kernel) {
  static std::map<const void*, int> bytes;
  return bytes.try_emplace(kernel, 48 * 1024).first->second;
}

}  // namespace emulator

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel kernel, cudaFuncAttribute, int bytes) {
  if (bytes > emulator::shared_limit()) return cudaErrorInvalidValue;
  emulator::allowed_shared(reinterpret_cast<const void*>(kernel)) = bytes;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  return *blocks = emulator::kBlocksPerMultiprocessor, cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int byte, size_t bytes, cudaStream_t) {
  return std::memset(to, byte, bytes), cudaSuccess;
}
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
inline cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long* capture) {
  *status = emulator::capture() ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  static unsigned long long anything = 1;
  *capture = emulator::capture() ? emulator::capture() : ++anything;
  return cudaSuccess;
}
template <class T>
cudaError_t cudaGetSymbolAddress(void** address, T& symbol) {
  return *address = &symbol, cudaSuccess;
}
template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... arguments) {
  if (config->dynamicSmemBytes > size_t(emulator::allowed_shared(reinterpret_cast<const void*>(kernel))))
    return cudaErrorInvalidValue;
  std::pair<void (*)(P...), std::tuple<P...>> call{kernel, {std::forward<A>(arguments)...}};
  auto body = [](void* given) {
    auto [function, parameters] = *static_cast<decltype(call)*>(given);
    std::apply(function, parameters);
  };
  emulator::launch(config->gridDim, config->blockDim, config->dynamicSmemBytes, body, &call);
  return cudaSuccess;
}

// --- what kernels call ---

inline void __syncthreads() { emulator::barrier(); }
inline void __syncwarp(unsigned mask = ~0u) {
  int nothing = 0;
  emulator::exchange(mask, &nothing, sizeof nothing, [](void*) {});
}

namespace emulator {

template <class T>
struct Brought {
  T value;
  int lane;  // whose value is wanted
};

template <class T>
T shuffle(unsigned mask, T value, int lane) {
  Brought<T> mine{value, lane};
  exchange(mask, &mine, sizeof mine, [](void* all) {
    auto* values = static_cast<Brought<T>*>(all);
    Brought<T> before[32];
    std::copy_n(values, 32, before);
    for (int i = 0; i < 32; ++i) values[i].value = before[before[i].lane & 31].value;
  });
  return mine.value;
}

inline int lane() { return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32; }

}  // namespace emulator

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return emulator::shuffle(mask, value, (emulator::lane() & -width) + (lane & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int = 32) {
  return emulator::shuffle(mask, value, emulator::lane() ^ bits);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int distance, int width = 32) {
  int lane = emulator::lane(), inside = (lane & (width - 1)) >= distance;
  return emulator::shuffle(mask, value, inside ? lane - distance : lane);
}

// Integers only: the order of floating-point atomics is not fixed.
template <class T, class = std::enable_if_t<std::is_integral_v<T>>>
T atomicAdd(T* address, T value) {
  return __atomic_fetch_add(address, value, __ATOMIC_ACQ_REL);
}
template <class T, class = std::enable_if_t<std::is_integral_v<T>>>
T atomicExch(T* address, T value) {
  return __atomic_exchange_n(address, value, __ATOMIC_ACQ_REL);
}

template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class A, class B>
auto min(A a, B b) {
  using C = std::common_type_t<A, B>;
  return C(a) < C(b) ? C(a) : C(b);
}
template <class A, class B>
auto max(A a, B b) {
  using C = std::common_type_t<A, B>;
  return C(a) < C(b) ? C(b) : C(a);
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned which) {
  uint64_t bytes = uint64_t(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= unsigned(bytes >> (which >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return result;
}
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
