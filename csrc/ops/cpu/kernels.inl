// Included by kernels.cpp once per instruction set, with ISA naming the namespace and BYTES the vector width.
// GCC vector extensions carry the arithmetic; intrinsics stand only where the extensions compile badly.

namespace pyfastpeft::ISA {

template <class C>
struct Simd {
  typedef C V __attribute__((vector_size(BYTES)));
  static constexpr int64_t lanes = BYTES / sizeof(C);
};
template <class C>
using Vec = typename Simd<C>::V;

typedef uint16_t Bits16 __attribute__((vector_size(BYTES / 2)));
typedef uint32_t Bits32 __attribute__((vector_size(BYTES)));
typedef uint64_t Bits64 __attribute__((vector_size(BYTES)));

template <class V>
inline V load_bits(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
inline void store_bits(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// --- elements <-> lanes of C ---

inline Vec<double> load(const double* p) { return load_bits<Vec<double>>(p); }
inline Vec<float> load(const float* p) { return load_bits<Vec<float>>(p); }
inline Vec<float> load(const bf16* p) {
  return (Vec<float>)(__builtin_convertvector(load_bits<Bits16>(p), Bits32) << 16);
}
inline void store(double* p, Vec<double> v) { store_bits(p, v); }
inline void store(float* p, Vec<float> v) { store_bits(p, v); }
inline void store(bf16* p, Vec<float> v) {
  Bits32 u = (Bits32)v;
  Bits32 rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  Bits32 nan = (u >> 16) | 0x40;  // quiet, and safe from rounding up to infinity or to zero
  Bits32 is_nan = (Bits32)((u & 0x7fffffff) > 0x7f800000);
  store_bits(p, __builtin_convertvector((rounded & ~is_nan) | (nan & is_nan), Bits16));
}
#if BYTES == 64
inline Vec<float> load(const f16* p) { return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline void store(f16* p, Vec<float> v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif BYTES == 32
inline Vec<float> load(const f16* p) { return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
inline void store(f16* p, Vec<float> v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
inline Vec<float> load(const f16* p) {
  Vec<float> v;
  for (int64_t i = 0; i < Simd<float>::lanes; ++i) v[i] = to_float(p[i]);
  return v;
}
inline void store(f16* p, Vec<float> v) {
  for (int64_t i = 0; i < Simd<float>::lanes; ++i) p[i] = to_f16(v[i]);
}
#endif

template <class C>
inline Vec<C> splat(C value) {
  return value - Vec<C>{};
}

template <class C, int64_t Lanes>
inline C sum(const C* v) {
  if constexpr (Lanes == 1) {
    return *v;
  } else {
    return sum<C, Lanes / 2>(v) + sum<C, Lanes / 2>(v + Lanes / 2);
  }
}
template <class C>
inline C sum(Vec<C> v) {
  C lanes[Simd<C>::lanes];
  store_bits(lanes, v);
  return sum<C, Simd<C>::lanes>(lanes);
}

// f(pointer) with the pointer typed by its dtype; C = double goes with f64 alone.
template <class C, class F>
inline void typed(Dtype dtype, const void* p, F f) {
  if constexpr (sizeof(C) == 8) {
    f((const double*)p);
  } else if (dtype == Dtype::f32) {
    f((const float*)p);
  } else if (dtype == Dtype::bf16) {
    f((const bf16*)p);
  } else {
    f((const f16*)p);
  }
}

template <class C>
void widen(Dtype dtype, const void* in, C* out, int64_t n) {
  typed<C>(dtype, in, [&](auto* p) {
    int64_t i = 0;
    for (; i + Simd<C>::lanes <= n; i += Simd<C>::lanes) store(out + i, load(p + i));
    for (; i < n; ++i) out[i] = to_float(p[i]);
  });
}

template <class C>
void narrow(Dtype dtype, const C* in, void* out, int64_t n) {
  typed<C>(dtype, out, [&](auto* q) {
    auto* p = const_cast<std::remove_const_t<std::remove_pointer_t<decltype(q)>>*>(q);
    int64_t i = 0;
    for (; i + Simd<C>::lanes <= n; i += Simd<C>::lanes) store(p + i, load(in + i));
    for (; i < n; ++i) from_float(in[i], p[i]);
  });
}

// --- matmul tiles ---

// T rows of x against R rows of a: T * R accumulators.
template <class C, class A, int T, int R>
inline void dot_tile(const C* const* x, const A* a, int64_t lda, int64_t k, C* const* s, int64_t rank) {
  Vec<C> acc[T][R] = {};
  int64_t i = 0;
  for (; i + Simd<C>::lanes <= k; i += Simd<C>::lanes) {
    Vec<C> row[R];
    for (int r = 0; r < R; ++r) row[r] = load(a + r * lda + i);
    for (int t = 0; t < T; ++t) {
      Vec<C> v = load(x[t] + i);
      for (int r = 0; r < R; ++r) acc[t][r] += v * row[r];
    }
  }
  for (int t = 0; t < T; ++t) {
    for (int r = 0; r < R; ++r) {
      C total = sum<C>(acc[t][r]);
      for (int64_t j = i; j < k; ++j) total += x[t][j] * to_float(a[r * lda + j]);
      s[t][rank + r] = total;
    }
  }
}

template <class C, class A, int T>
inline void dot_ranks(const C* const* x, const A* a, int64_t lda, int64_t ranks, int64_t k, C* const* s) {
  int64_t r = 0;
  for (; r + 4 <= ranks; r += 4) dot_tile<C, A, T, 4>(x, a + r * lda, lda, k, s, r);
  for (; r < ranks; ++r) dot_tile<C, A, T, 1>(x, a + r * lda, lda, k, s, r);
}

template <class C>
void dot(const C* const* x, int64_t tokens, Dtype dtype, const void* a, int64_t lda, int64_t ranks, int64_t k,
         C* const* s) {
  constexpr int T = BYTES == 64 ? 6 : 3;  // T * 4 accumulators, 4 rows of a and 1 of x fill the registers
  typed<C>(dtype, a, [&](auto* rows) {
    using A = std::remove_const_t<std::remove_pointer_t<decltype(rows)>>;
    int64_t t = 0;
    for (; t + T <= tokens; t += T) dot_ranks<C, A, T>(x + t, rows, lda, ranks, k, s + t);
    for (; t + 2 <= tokens; t += 2) dot_ranks<C, A, 2>(x + t, rows, lda, ranks, k, s + t);
    for (; t < tokens; ++t) dot_ranks<C, A, 1>(x + t, rows, lda, ranks, k, s + t);
  });
}

// T rows of y, W vectors wide, from column n.
template <class C, int T, int W>
inline void axpy_tile(const C* const* s, int64_t step, const C* c, int64_t ldc, int64_t depth, C* const* y, int64_t n,
                      bool accumulate) {
  constexpr int64_t L = Simd<C>::lanes;
  Vec<C> acc[T][W] = {};
  if (accumulate)
    for (int t = 0; t < T; ++t)
      for (int w = 0; w < W; ++w) acc[t][w] = load(y[t] + n + w * L);
  for (int64_t q = 0; q < depth; ++q) {
    Vec<C> v[W];
    for (int w = 0; w < W; ++w) v[w] = load(c + q * ldc + n + w * L);
    for (int t = 0; t < T; ++t) {
      Vec<C> factor = splat(s[t][q * step]);
      for (int w = 0; w < W; ++w) acc[t][w] += factor * v[w];
    }
  }
  for (int t = 0; t < T; ++t)
    for (int w = 0; w < W; ++w) store(y[t] + n + w * L, acc[t][w]);
}

template <class C, int T>
inline void axpy_rows(const C* const* s, int64_t step, const C* c, int64_t ldc, int64_t depth, C* const* y,
                      int64_t columns, bool accumulate) {
  constexpr int64_t L = Simd<C>::lanes;
  int64_t n = 0;
  for (; n + 2 * L <= columns; n += 2 * L) axpy_tile<C, T, 2>(s, step, c, ldc, depth, y, n, accumulate);
  for (; n + L <= columns; n += L) axpy_tile<C, T, 1>(s, step, c, ldc, depth, y, n, accumulate);
  for (; n < columns; ++n) {
    for (int t = 0; t < T; ++t) {
      C total = accumulate ? y[t][n] : C(0);
      for (int64_t q = 0; q < depth; ++q) total += s[t][q * step] * c[q * ldc + n];
      y[t][n] = total;
    }
  }
}

template <class C>
void axpy(const C* const* s, int64_t step, int64_t rows, const C* c, int64_t ldc, int64_t depth, C* const* y,
          int64_t columns, bool accumulate) {
  int64_t t = 0;
  for (; t + 6 <= rows; t += 6) axpy_rows<C, 6>(s + t, step, c, ldc, depth, y + t, columns, accumulate);
  for (; t + 2 <= rows; t += 2) axpy_rows<C, 2>(s + t, step, c, ldc, depth, y + t, columns, accumulate);
  for (; t < rows; ++t) axpy_rows<C, 1>(s + t, step, c, ldc, depth, y + t, columns, accumulate);
}

template <class C>
void transpose(Dtype dtype, const void* in, int64_t ldi, int64_t rows, int64_t columns, C scale, C* out, int64_t ldo) {
  typed<C>(dtype, in, [&](auto* p) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) out[j * ldo + i] = scale * to_float(p[i * ldi + j]);
  });
}

// --- elementwise ---

template <class C>
void add(C* x, const C* b, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] += b[i];
}

template <class C>
void multiply(C* x, const C* l, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] *= l[i];
}

template <class C>
void multiply_add(const C* a, const C* b, C* sum, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sum[i] += a[i] * b[i];
}

// Products of two numbers under 2^32, each in a 64-bit lane.
inline Bits64 multiply_words(Bits64 a, uint64_t b) {
#if BYTES == 64
  return (Bits64)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif BYTES == 32
  return (Bits64)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#else
  return a * b;
#endif
}

template <class C>
void drop(C* x, int64_t n, int64_t k0, int64_t token, uint64_t seed, double p) {
  constexpr int64_t L = BYTES / 8;  // counters at a time
  const uint64_t mask = 0xffffffff, threshold = (uint64_t)(p * 4294967296.0);
  const C kept = C(1) / C(1 - p);
  for (int64_t i = 0; i < n; i += 4 * L) {
    Bits64 c0 = {}, c1 = {}, c2 = {}, c3 = {};
    for (int64_t l = 0; l < L; ++l) c0[l] = (uint64_t)(k0 + i) / 4 + l, c1[l] = (uint64_t)token;
    uint64_t key0 = seed & mask, key1 = seed >> 32;
    for (int round = 0; round < 10; ++round) {
      Bits64 p0 = multiply_words(c0, 0xD2511F53), p1 = multiply_words(c2, 0xCD9E8D57);
      c0 = (p1 >> 32) ^ c1 ^ key0;
      c1 = p1 & mask;
      c2 = (p0 >> 32) ^ c3 ^ key1;
      c3 = p0 & mask;
      key0 = (key0 + 0x9E3779B9) & mask;
      key1 = (key1 + 0xBB67AE85) & mask;
    }
    uint64_t words[4][L];
    store_bits(words[0], c0);
    store_bits(words[1], c1);
    store_bits(words[2], c2);
    store_bits(words[3], c3);
    int64_t count = n - i < 4 * L ? n - i : 4 * L;
    for (int64_t e = 0; e < count; ++e) x[i + e] *= words[e % 4][e / 4] >= threshold ? kept : C(0);
  }
}

template <class C>
constexpr Kernels<C> table = {widen<C>, narrow<C>,   dot<C>,          axpy<C>, transpose<C>,
                              add<C>,   multiply<C>, multiply_add<C>, drop<C>};

}  // namespace pyfastpeft::ISA
