#include "ops/cpu/kernels.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <string>
#include <type_traits>
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#include <sys/auxv.h>
#endif

namespace pyfastpeft {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

static inline double to_float(double v) { return v; }
static inline float to_float(float v) { return v; }
static inline float to_float(bf16 v) {
  uint32_t u = (uint32_t)v.bits << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
static inline float to_float(f16 v) { return torch::headeronly::detail::fp16_ieee_to_fp32_value(v.bits); }
static inline f16 to_f16(float v) { return {torch::headeronly::detail::fp16_ieee_from_fp32_value(v)}; }
static inline void from_float(double v, double& out) { out = v; }
static inline void from_float(float v, float& out) { out = v; }
static inline void from_float(float v, f16& out) { out = to_f16(v); }
static inline void from_float(float v, bf16& out) {
  uint32_t u;
  memcpy(&u, &v, 4);
  out.bits = v != v ? (u >> 16) | 0x40 : (u + 0x7fff + ((u >> 16) & 1)) >> 16;
}

}  // namespace pyfastpeft

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 finds one in its own AVX-512 header
#endif

#define ISA baseline
#define BYTES 16
#include "ops/cpu/kernels.inl"
#undef ISA
#undef BYTES

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define ISA avx2
#define BYTES 32
#include "ops/cpu/kernels.inl"
#undef ISA
#undef BYTES
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512")
#endif
#define ISA avx512
#define BYTES 64
#include "ops/cpu/kernels.inl"
#undef ISA
#undef BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

namespace pyfastpeft {

namespace {

enum Level { BASELINE, AVX2, AVX512 };
const char* const level_names[] = {"baseline", "avx2", "avx512"};

struct Cpu {
  Level level = BASELINE;
  // Whether torch multiplies this dtype well: 16-bit ones in hardware, float32 at this CPU's speed. Off x86-64 and
  // aarch64, torch knows best.
  bool bf16 = true, f16 = true, f32 = true;

  Cpu() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    unsigned eax, ebx, ecx, edx;
    bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx >> 29 & 1);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c) level = AVX2;
    if (level == AVX2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
      level = AVX512;
    if (const char* cap = std::getenv("PYFASTPEFT_CPU_ISA"))
      for (int lower = BASELINE; lower < level; ++lower)
        if (!std::strcmp(cap, level_names[lower])) level = Level(lower);
    // MKL, with which torch is mostly built, runs far below the speed of AMD's CPUs; our own loops need AVX2 to beat it.
    f32 = level == BASELINE || !__builtin_cpu_is("amd");
    bf16 = level == AVX512 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 5 & 1);  // AVX512_BF16
    f16 = level == AVX512 && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx >> 23 & 1);  // AVX512_FP16
#elif defined(__aarch64__)
    bf16 = f16 = getauxval(AT_HWCAP2) >> 14 & 1;  // HWCAP2_BF16: oneDNN has a product for neither without it
#endif
    if (const char* whose = std::getenv("PYFASTPEFT_CPU_MATMUL"))
      f32 = std::strcmp(whose, "own") && (f32 || !std::strcmp(whose, "torch"));
  }
};

const Cpu& cpu() {
  static const Cpu instance;
  return instance;
}

}  // namespace

template <class C>
const Kernels<C>& kernels() {
#if defined(__x86_64__)
  if (cpu().level == AVX512) return avx512::table<C>;
  if (cpu().level == AVX2) return avx2::table<C>;
#endif
  return baseline::table<C>;
}
template const Kernels<float>& kernels<float>();
template const Kernels<double>& kernels<double>();

const char* cpu_capability() { return level_names[cpu().level]; }

bool fast_matmul(Dtype dtype) {
  switch (dtype) {
    case Dtype::bf16:
      return cpu().bf16;
    case Dtype::f16:
      return cpu().f16;
    case Dtype::f32:
      return cpu().f32;
    case Dtype::f64:
      break;
  }
  return true;
}

}  // namespace pyfastpeft
