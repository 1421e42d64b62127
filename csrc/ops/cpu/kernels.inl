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
typedef int32_t Signed32 __attribute__((vector_size(BYTES)));
typedef uint32_t Bits32 __attribute__((vector_size(BYTES)));
typedef uint64_t Bits64 __attribute__((vector_size(BYTES)));

template <class V>
struct Unaligned {
  typedef V type __attribute__((aligned(1), may_alias));
};
template <class V>
inline V load_bits(const void* p) {
  return *(const typename Unaligned<V>::type*)p;
}
template <class V>
inline void store_bits(void* p, V v) {
  *(typename Unaligned<V>::type*)p = v;
}

// --- elements <-> lanes of C ---

inline Vec<double> load(const double* p) { return load_bits<Vec<double>>(p); }
inline Vec<float> load(const float* p) { return load_bits<Vec<float>>(p); }
inline Vec<float> load(const bf16* p) {
#if defined(__aarch64__)
  return (Vec<float>)(vmovl_u16(load_bits<uint16x4_t>(p)) << 16);
#else
  return (Vec<float>)(__builtin_convertvector(load_bits<Bits16>(p), Bits32) << 16);
#endif
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
#elif defined(__aarch64__)
inline Vec<float> load(const f16* p) { return (Vec<float>)vcvt_f32_f16(load_bits<float16x4_t>(p)); }
inline void store(f16* p, Vec<float> v) { store_bits(p, vcvt_f16_f32((float32x4_t)v)); }
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

// Vectors of a fixed number of lanes, whatever the instruction set makes of them.
template <class C, int N>
struct Lanes {
  typedef C V __attribute__((vector_size(N * sizeof(C))));
};
template <class C>
using Four = typename Lanes<C, 4>::V;

#if defined(__clang__)
#define SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define SHUFFLE(a, b, i, j, k, l) \
  __builtin_shuffle(a, b, (typename Lanes<std::conditional_t<sizeof(a[0]) == 8, int64_t, int32_t>, 4>::V){i, j, k, l})
#endif

// The sums of the lanes of four vectors.
template <class C>
inline Four<C> sums(Four<C> a, Four<C> b, Four<C> c, Four<C> d) {
  Four<C> ab = SHUFFLE(a, b, 0, 4, 2, 6) + SHUFFLE(a, b, 1, 5, 3, 7);
  Four<C> cd = SHUFFLE(c, d, 0, 4, 2, 6) + SHUFFLE(c, d, 1, 5, 3, 7);
  return SHUFFLE(ab, cd, 0, 1, 4, 5) + SHUFFLE(ab, cd, 2, 3, 6, 7);
}

// The lower half of the lanes plus the upper one.
template <class V, class Half>
inline Half halved(V v) {
#if BYTES == 64
  if constexpr (sizeof(V) == 64)
    return (Half)_mm512_castsi512_si256((__m512i)v) + (Half)_mm512_extracti64x4_epi64((__m512i)v, 1);
#endif
#if BYTES >= 32
  if constexpr (sizeof(V) == 32)
    return (Half)_mm256_castsi256_si128((__m256i)v) + (Half)_mm256_extracti128_si256((__m256i)v, 1);
#endif
  char bytes[sizeof(V)];
  store_bits(bytes, v);
  return load_bits<Half>(bytes) + load_bits<Half>(bytes + sizeof(Half));
}

template <class C, int N>
inline Four<C> fold(typename Lanes<C, N>::V v) {
  if constexpr (N == 4) {
    return (Four<C>)v;
  } else if constexpr (N < 4) {  // two lanes of double
    return Four<C>{v[0], v[1], 0, 0};
  } else {
    return fold<C, N / 2>(halved<typename Lanes<C, N>::V, typename Lanes<C, N / 2>::V>(v));
  }
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
constexpr int64_t WIDTH = (BYTES == 64 ? 4 : 2) * Simd<C>::lanes;

template <class C, bool Scaled>
void copy_rows(Dtype dtype, const void* in, int64_t ldi, int64_t rows, int64_t columns, const C* scale, C* out,
               int64_t ldo) {
  constexpr int64_t L = Simd<C>::lanes;
  typed<C>(dtype, in, [&](auto* row) {
    for (int64_t i = 0; i < rows; ++i, row += ldi, out += ldo) {
      Vec<C> factor = splat(Scaled ? scale[i] : C(1));
      auto at = [&](int64_t j) { return Scaled ? factor * load(row + j) : load(row + j); };
      int64_t j = 0;
      for (; j + WIDTH<C> <= columns; j += WIDTH<C>)
        for (int64_t w = 0; w < WIDTH<C>; w += L) store(out + j + w, at(j + w));
      for (; j + L <= columns; j += L) store(out + j, at(j));
      for (; j < columns; ++j) out[j] = Scaled ? scale[i] * to_float(row[j]) : to_float(row[j]);
    }
  });
}

template <class C>
void copy(Dtype dtype, const void* in, int64_t ldi, int64_t rows, int64_t columns, const C* scale, C* out, int64_t ldo) {
  (scale ? copy_rows<C, true> : copy_rows<C, false>)(dtype, in, ldi, rows, columns, scale, out, ldo);
}

template <class C>
void widen(Dtype dtype, const void* in, C* out, int64_t n) {
  copy_rows<C, false>(dtype, in, 0, 1, n, nullptr, out, 0);
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

// Bytes of a long row that are asked for ahead of their use: a page, since processors prefetch within pages only; into
// the second cache, since the first waits for few lines at a time.
constexpr int64_t AHEAD = 4096;

// s[t][rank + r] (+)= x[t] . a[r] for T rows of x and R (1 or 4) rows of a: T * R accumulators. Few tokens ask for a's
// elements that are `next` on. With Ahead, every `passes`-th row of x from the rank / 4-th on is asked for `ahead`
// elements on.
template <class C, class A, int T, int R, bool Ahead>
inline void dot_tile(const C* const* x, const A* a, int64_t lda, int64_t begin, int64_t end, C* const* s, int64_t rank,
                     bool accumulate, int64_t next, int64_t passes, int64_t ahead) {
  constexpr int64_t L = Simd<C>::lanes;
  Vec<C> acc[T][R] = {};
  int64_t i = begin;
  if constexpr (T * R == 1) {  // one sum would wait for itself
    Vec<C> parts[4] = {};
    for (; i + 4 * L <= end; i += 4 * L)
#pragma GCC unroll 4
      for (int p = 0; p < 4; ++p) parts[p] += load(x[0] + i + p * L) * load(a + i + p * L);
    acc[0][0] = (parts[0] + parts[1]) + (parts[2] + parts[3]);
  }
  for (; i + L <= end; i += L) {
    Vec<C> row[R];
    for (int r = 0; r < R; ++r) row[r] = load(a + r * lda + i);
    if (T <= 2)  // more tokens leave time to wait
      for (int r = 0; r < R; ++r) __builtin_prefetch(a + r * lda + i + next, 0, 2);
    if constexpr (Ahead)
      for (int64_t t = rank / 4; t < T; t += passes) __builtin_prefetch(x[t] + i + ahead, 0, 2);
    for (int t = 0; t < T; ++t) {
      Vec<C> v = load(x[t] + i);
      for (int r = 0; r < R; ++r) acc[t][r] += v * row[r];
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    Four<C> total;
    if constexpr (R == 4) {
      total = sums<C>(fold<C, L>(acc[t][0]), fold<C, L>(acc[t][1]), fold<C, L>(acc[t][2]), fold<C, L>(acc[t][3]));
    } else {
      total = sums<C>(fold<C, L>(acc[t][0]), Four<C>{}, Four<C>{}, Four<C>{});
    }
    for (int64_t j = i; j < end; ++j)
      for (int r = 0; r < R; ++r) total[r] += x[t][j] * to_float(a[r * lda + j]);
    if constexpr (R == 4) {
      store_bits(s[t] + rank, accumulate ? load_bits<Four<C>>(s[t] + rank) + total : total);
    } else {
      s[t][rank] = accumulate ? s[t][rank] + total[0] : total[0];
    }
  }
}

template <class C, class A, int T, bool Ahead = false>
inline void dot_ranks(const C* const* x, const A* a, int64_t lda, int64_t ranks, int64_t k, C* const* s,
                      int64_t stride = 0) {
  constexpr int64_t BLOCK = 4096 / sizeof(C);  // T rows of x this long stay in the first cache for all ranks
  for (int64_t begin = 0; begin < k; begin += BLOCK) {
    int64_t end = k - begin < 2 * BLOCK ? k : begin + BLOCK, r = 0, passes = ranks / 4;
    int64_t next = end == k ? 4 * lda - begin : AHEAD / sizeof(A);  // after the last columns the rows below come
    // The rows of the next tile come while this one's are used, a share of them in every pass.
    for (; r + 4 <= ranks; r += 4)
      dot_tile<C, A, T, 4, Ahead>(x, a + r * lda, lda, begin, end, s, r, begin > 0, next, passes, T * stride);
    for (; r < ranks; ++r) dot_tile<C, A, T, 1, false>(x, a + r * lda, lda, begin, end, s, r, begin > 0, next, 0, 0);
    if (end == k) break;
  }
}

template <class C>
void dot(const C* const* x, int64_t stride, int64_t tokens, Dtype dtype, const void* a, int64_t lda, int64_t ranks,
         int64_t k, C* const* s) {
  constexpr int T = BYTES == 64 ? 6 : 3;  // T * 4 accumulators, 4 rows of a and 1 of x fill the registers
  typed<C>(dtype, a, [&](auto* rows) {
    using A = std::remove_const_t<std::remove_pointer_t<decltype(rows)>>;
    int64_t t = 0;
    if (stride)
      for (; t + T <= tokens; t += T) dot_ranks<C, A, T, true>(x + t, rows, lda, ranks, k, s + t, stride);
    for (; t + T <= tokens; t += T) dot_ranks<C, A, T>(x + t, rows, lda, ranks, k, s + t);
    if constexpr (T > 4)
      for (; t + 4 <= tokens; t += 4) dot_ranks<C, A, 4>(x + t, rows, lda, ranks, k, s + t);
    for (; t + 2 <= tokens; t += 2) dot_ranks<C, A, 2>(x + t, rows, lda, ranks, k, s + t);
    for (; t < tokens; ++t) dot_ranks<C, A, 1>(x + t, rows, lda, ranks, k, s + t);
  });
}

enum class Ask { nothing, c, y, block };

// T rows of y, W vectors wide, from column n.
template <class C, int T, int W, bool Accumulate, Ask ask = Ask::nothing>
inline void axpy_tile(const C* const* s, int64_t step, const C* c, int64_t ldc, int64_t depth, C* const* y, int64_t n,
                      Next next = {}) {
  constexpr int64_t L = Simd<C>::lanes;
  Vec<C> acc[T][W];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 8
    for (int w = 0; w < W; ++w) acc[t][w] = Vec<C>{};
  auto add = [&](int64_t q) {
    Vec<C> v[W];
#pragma GCC unroll 8
    for (int w = 0; w < W; ++w) v[w] = load(c + q * ldc + n + w * L);
    if constexpr (ask == Ask::c || ask == Ask::y) {
      const C* row = ask == Ask::c ? c + q * ldc + next.c : y[q < T ? q : 0] + next.y;
#pragma GCC unroll 8
      for (int w = 0; w < W; ++w) __builtin_prefetch(row + n + w * L, 0, ask == Ask::c ? 2 : 3);
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      Vec<C> factor = splat(s[t][q * step]);
#pragma GCC unroll 8
      for (int w = 0; w < W; ++w) acc[t][w] += factor * v[w];
    }
  };
  int64_t q = 0;
  if constexpr (ask == Ask::block) {
    constexpr int64_t SHARES = BYTES == 64 ? 1 : 2;  // where a step takes less time, a loop's end costs more
    for (int64_t t = 0; q + SHARES * Next::STEPS <= depth; t += 2) {
      for (int64_t end = q + SHARES * Next::STEPS; q < end; ++q) add(q);
      next.block->ask(SHARES);
      for (int64_t i = t; i < t + 2 && i < T; ++i)
        for (int w = 0; w < W; ++w) __builtin_prefetch(y[i] + next.y + n + w * L, 0, 3);
    }
  }
  for (; q < depth; ++q) add(q);
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 8
    for (int w = 0; w < W; ++w) {
      C* to = y[t] + n + w * L;
      store(to, Accumulate ? load(to) + acc[t][w] : acc[t][w]);
    }
}

template <class C, int T, bool Accumulate>
inline void axpy_rows(const C* const* s, int64_t step, const C* c, int64_t ldc, int64_t depth, C* const* y,
                      int64_t columns, Next next) {
  constexpr int64_t L = Simd<C>::lanes;
  constexpr int W = WIDTH<C> / L;
  int64_t n = 0;
  if constexpr (T == 6) {
    if (next.block) {
      for (; n + W * L <= columns; n += W * L)
        axpy_tile<C, T, W, Accumulate, Ask::block>(s, step, c, ldc, depth, y, n, next);
      for (; n + L <= columns; n += L)
        axpy_tile<C, T, 1, Accumulate, Ask::block>(s, step, c, ldc, depth, y, n, next);
    }
    if (next.c)
      for (; n + W * L <= columns; n += W * L)
        axpy_tile<C, T, W, Accumulate, Ask::c>(s, step, c, ldc, depth, y, n, next);
    if (next.y)
      for (; n + W * L <= columns; n += W * L)
        axpy_tile<C, T, W, Accumulate, Ask::y>(s, step, c, ldc, depth, y, n, next);
  }
  for (; n + W * L <= columns; n += W * L) axpy_tile<C, T, W, Accumulate>(s, step, c, ldc, depth, y, n);
  for (; n + L <= columns; n += L) axpy_tile<C, T, 1, Accumulate>(s, step, c, ldc, depth, y, n);
  for (; n < columns; ++n) {
    for (int t = 0; t < T; ++t) {
      C total = 0;
      for (int64_t q = 0; q < depth; ++q) total += s[t][q * step] * c[q * ldc + n];
      y[t][n] = Accumulate ? y[t][n] + total : total;
    }
  }
}

template <class C, bool Accumulate>
inline void axpy_all(const C* const* s, int64_t step, int64_t rows, const C* c, int64_t ldc, int64_t depth, C* const* y,
                     int64_t columns, Next next) {
  int64_t t = 0;
  auto own = [&] { return Next{t ? 0 : next.c, next.y, next.block}; };  // rows of c are the same for all
  for (; t + 6 <= rows; t += 6) axpy_rows<C, 6, Accumulate>(s + t, step, c, ldc, depth, y + t, columns, own());
  for (; t + 4 <= rows; t += 4) axpy_rows<C, 4, Accumulate>(s + t, step, c, ldc, depth, y + t, columns, own());
  for (; t + 2 <= rows; t += 2) axpy_rows<C, 2, Accumulate>(s + t, step, c, ldc, depth, y + t, columns, own());
  for (; t < rows; ++t) axpy_rows<C, 1, Accumulate>(s + t, step, c, ldc, depth, y + t, columns, own());
}

template <class C>
void axpy(const C* const* s, int64_t step, int64_t rows, const C* c, int64_t ldc, int64_t depth, C* const* y,
          int64_t columns, bool accumulate, Next next) {
  auto run = accumulate ? axpy_all<C, true> : axpy_all<C, false>;
  run(s, step, rows, c, ldc, depth, y, columns, next);
}

// Four rows of b at a time, N ranks at a time.
template <class C, int N>
inline void project_lanes(const C* s, const C* b, int64_t ldb, int64_t rank, C* y, int64_t columns) {
  using V = typename Lanes<C, N>::V;
  int64_t n = 0;
  for (; n + 4 <= columns; n += 4) {
    V acc[4] = {};
    for (int64_t r = 0; r < rank; r += N) {
      V factor = load_bits<V>(s + r);
      for (int i = 0; i < 4; ++i) acc[i] += factor * load_bits<V>(b + (n + i) * ldb + r);
    }
    for (int i = 0; i < 4; ++i) __builtin_prefetch(b + (n + i) * ldb + AHEAD / sizeof(C), 0, 2);
    Four<C> total = sums<C>(fold<C, N>(acc[0]), fold<C, N>(acc[1]), fold<C, N>(acc[2]), fold<C, N>(acc[3]));
    store_bits(y + n, load_bits<Four<C>>(y + n) + total);
  }
  for (; n < columns; ++n)
    for (int64_t r = 0; r < rank; ++r) y[n] += s[r] * b[n * ldb + r];
}

template <class C>
void project(const C* s, const C* b, int64_t ldb, int64_t rank, C* y, int64_t columns) {
  if (rank % 8 == 0) {
    project_lanes<C, 8>(s, b, ldb, rank, y, columns);
  } else if (rank % 4 == 0) {
    project_lanes<C, 4>(s, b, ldb, rank, y, columns);
  } else {
    for (int64_t n = 0; n < columns; ++n) {
      C total = 0;
      for (int64_t r = 0; r < rank; ++r) total += s[r] * b[n * ldb + r];
      y[n] += total;
    }
  }
}

// The first N elements, four or eight, as C.
template <class C, int N, class A>
inline typename Lanes<C, N>::V load_lanes(const A* p) {
  using V = typename Lanes<C, N>::V;
  if constexpr (N == Simd<C>::lanes) {
    return load(p);
  } else if constexpr (std::is_same_v<A, C>) {
    return load_bits<V>(p);
  } else if constexpr (std::is_same_v<A, bf16>) {
    auto bits = load_bits<typename Lanes<uint16_t, N>::V>(p);
    return (V)(__builtin_convertvector(bits, typename Lanes<uint32_t, N>::V) << 16);
  } else {
#if BYTES == 64
    if constexpr (N == 8) return (V)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#endif
    V v;
    for (int i = 0; i < N; ++i) v[i] = to_float(p[i]);
    return v;
  }
}

// out[j][i] = scale * in[i][j] for i, j < 4.
template <class C, class A>
inline void transpose_four(const A* in, int64_t ldi, C scale, C* out, int64_t ldo) {
  Four<C> a = load_lanes<C, 4>(in), b = load_lanes<C, 4>(in + ldi);
  Four<C> c = load_lanes<C, 4>(in + 2 * ldi), d = load_lanes<C, 4>(in + 3 * ldi);
  Four<C> ab0 = SHUFFLE(a, b, 0, 4, 1, 5), ab2 = SHUFFLE(a, b, 2, 6, 3, 7);
  Four<C> cd0 = SHUFFLE(c, d, 0, 4, 1, 5), cd2 = SHUFFLE(c, d, 2, 6, 3, 7);
  store_bits(out, SHUFFLE(ab0, cd0, 0, 1, 4, 5) * scale);
  store_bits(out + ldo, SHUFFLE(ab0, cd0, 2, 3, 6, 7) * scale);
  store_bits(out + 2 * ldo, SHUFFLE(ab2, cd2, 0, 1, 4, 5) * scale);
  store_bits(out + 3 * ldo, SHUFFLE(ab2, cd2, 2, 3, 6, 7) * scale);
}

#if BYTES >= 32
// a[j][i] = a[i][j] for i, j < 8.
inline void transpose_eight(__m256 (&a)[8]) {
  __m256 b[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  __m256 c[8];
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    c[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
    c[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
    c[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    c[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    a[j] = _mm256_permute2f128_ps(c[j], c[j + 4], 0x20);
    a[j + 4] = _mm256_permute2f128_ps(c[j], c[j + 4], 0x31);
  }
}

// out[j][i] = scale * in[i][j] for i < 8, j < 8; for bfloat16 j < 16, two of a row at a time.
template <class A>
inline void transpose_rows(const A* in, int64_t ldi, float scale, float* out, int64_t ldo) {
  constexpr bool PAIRS = std::is_same_v<A, bf16>;
  __m256 a[8], factor = _mm256_set1_ps(scale);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    a[i] = PAIRS ? load_bits<__m256>(in + i * ldi) : (__m256)load_lanes<float, 8>(in + i * ldi);
  transpose_eight(a);
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) {
    if constexpr (PAIRS) {
      __m256i bits = _mm256_castps_si256(a[j]), upper = _mm256_set1_epi32((int)0xffff0000);
      __m256 first = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
      __m256 second = _mm256_castsi256_ps(_mm256_and_si256(bits, upper));
      _mm256_storeu_ps(out + 2 * j * ldo, _mm256_mul_ps(factor, first));
      _mm256_storeu_ps(out + (2 * j + 1) * ldo, _mm256_mul_ps(factor, second));
    } else {
      _mm256_storeu_ps(out + j * ldo, _mm256_mul_ps(factor, a[j]));
    }
  }
}
#endif

template <class C>
void transpose(Dtype dtype, const void* in, int64_t ldi, int64_t rows, int64_t columns, C scale, C* out, int64_t ldo) {
  typed<C>(dtype, in, [&](auto* from) {
    using A = std::remove_const_t<std::remove_pointer_t<decltype(from)>>;
    constexpr bool EIGHT = BYTES >= 32 && sizeof(C) == 4;
    constexpr int64_t R = EIGHT ? 8 : 4, N = EIGHT && std::is_same_v<A, bf16> ? 16 : R;
    // Cache lines are used whole, since those of rows a power of two apart evict one another.
    constexpr int64_t LINE = 64 / sizeof(A);
    int64_t j = 0, end = columns / N * N;
    for (; j < end; j += LINE) {
      int64_t line = j + LINE < end ? j + LINE : end, i = 0;
      for (; i + R <= rows; i += R) {
        for (int64_t l = j; l < line; l += N) {
#if BYTES >= 32
          if constexpr (EIGHT) transpose_rows(from + i * ldi + l, ldi, scale, out + l * ldo + i, ldo);
#endif
          if constexpr (!EIGHT) transpose_four(from + i * ldi + l, ldi, scale, out + l * ldo + i, ldo);
        }
      }
      for (; i < rows; ++i)
        for (int64_t l = j; l < line; ++l) out[l * ldo + i] = scale * to_float(from[i * ldi + l]);
    }
    for (j = end; j < columns; ++j)
      for (int64_t i = 0; i < rows; ++i) out[j * ldo + i] = scale * to_float(from[i * ldi + j]);
  });
}

// --- elementwise ---

template <class C>
void add(C* x, const C* b, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] += b[i];
}

template <class C>
void multiply(const C* x, const C* l, C* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * l[i];
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
#elif defined(__aarch64__)
  return (Bits64)vmull_n_u32(vmovn_u64((uint64x2_t)a), (uint32_t)b);
#else
  return a * b;
#endif
}

template <class C>
void drop(C* x, int64_t n, int64_t k0, int64_t token, uint64_t seed, double p) {
  constexpr int64_t L = BYTES / 8;  // counters at a time
  const uint64_t mask = 0xffffffff;
  const uint32_t threshold = (uint32_t)(p * 4294967296.0);
  const C kept = C(1) / C(1 - p);
  Bits64 lane;
  for (int64_t l = 0; l < L; ++l) lane[l] = l;
  for (int64_t i = 0; i < n; i += 4 * L) {
    Bits64 c0 = lane + (uint64_t)(k0 + i) / 4, c1 = Bits64{} + (uint64_t)token, c2 = {}, c3 = {};
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
    // Counter l's four words belong to elements 4 l .. 4 l + 3.
    Bits64 low = c0 | c1 << 32, high = c2 | c3 << 32;
    uint64_t pairs[2 * L];
    for (int64_t l = 0; l < L; ++l) pairs[2 * l] = low[l], pairs[2 * l + 1] = high[l];
    uint32_t words[4 * L];
    __builtin_memcpy(words, pairs, sizeof words);
    int64_t count = n - i < 4 * L ? n - i : 4 * L;
    if (count == 4 * L) {
      for (int64_t e = 0; e < 4 * L; ++e) x[i + e] *= words[e] >= threshold ? kept : C(0);
    } else {
      for (int64_t e = 0; e < count; ++e) x[i + e] *= words[e] >= threshold ? kept : C(0);
    }
  }
}

// --- activations ---

// f of every lane.
template <class V, class F>
inline V lanewise(V v, F f) {
  for (size_t i = 0; i < sizeof(V) / sizeof(v[0]); ++i) v[i] = f(v[i]);
  return v;
}

// e^x; the argument is held where the result, its inverse and small multiples of them are normal numbers: subnormal ones
// slow down whatever reads them twentyfold. NaN stays NaN.
inline Vec<double> exponential(Vec<double> x) {
  return lanewise(x, [](double v) { return std::exp(v); });
}
inline Vec<float> exponential(Vec<float> x) {
  constexpr float HIGH = 0x1.62ep-1f, LOW = 0x1.0bfbe8p-15f;  // of ln 2: n * HIGH is exact
  constexpr float ROUND = 0x1.8p23f;                          // added and taken off again, it leaves an integer
  x = x < splat(-80.0f) ? splat(-80.0f) : x;
  x = x > splat(80.0f) ? splat(80.0f) : x;
  Vec<float> n = (x * 0x1.715476p+0f + ROUND) - ROUND, r = x - n * HIGH - n * LOW;
  Vec<float> series = splat(1.0f / 5040);
  for (float term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) series = series * r + term;
  return series * (Vec<float>)((Bits32)(__builtin_convertvector(n, Signed32) + 127) << 23);
}

// erfc(z) for z >= 0. For float e^(-z^2) times a polynomial in t = 1 / (1 + z / 2), fitted to a relative error of 4e-8.
inline Vec<double> complementary_error(Vec<double> z) {
  return lanewise(z, [](double v) { return std::erfc(v); });
}
inline Vec<float> complementary_error(Vec<float> z) {
  Vec<float> t = 1.0f / (1.0f + 0.5f * z), series = splat(-0.05889077112078667f);
  for (float term : {0.28370192646980286f, -0.485383540391922f, 0.2759779095649719f, -0.02517746202647686f,
                     0.2020697146654129f, 0.24326103925704956f, 0.2823534905910492f, 0.28208768367767334f})
    series = series * t + term;
  return exponential(-z * z) * series * t;
}

template <class V>
inline V logistic(V x) {
  return 1 / (1 + exponential(-x));
}

// The share of the normal distribution below x.
template <class V>
inline V normal_share(V x) {
  V above = decltype(x[0] + 0)(0.5) * complementary_error((x < 0 ? -x : x) * decltype(x[0] + 0)(M_SQRT1_2));
  return x < 0 ? above : 1 - above;
}

// Below 1/2 the eighth convergent of tanh's continued fraction, since 1 - 2 / (e^2x + 1) cancels there.
template <class V>
inline V hyperbolic_tangent(V x) {
  V size = x < 0 ? -x : x, q = x * x;
  V small = x * (((36 * q + 6930) * q + 270270) * q + 2027025) /
            ((((q + 630) * q + 51975) * q + 945945) * q + 2027025);
  V large = 1 - 2 / (exponential(2 * size) + 1);
  return size < decltype(x[0] + 0)(0.5) ? small : x < 0 ? -large : large;
}

// f of every element, a vector at a time.
template <class C, class F>
inline void elementwise(C* x, int64_t n, F f) {
  constexpr int64_t L = Simd<C>::lanes;
  int64_t i = 0;
  for (; i + L <= n; i += L) store(x + i, f(load(x + i)));
  if (i == n) return;
  C rest[L] = {};
  for (int64_t j = i; j < n; ++j) rest[j - i] = x[j];
  store(rest, f(load(rest)));
  for (int64_t j = i; j < n; ++j) x[j] = rest[j - i];
}

// gelu_tanh(x) = x logistic(2 sqrt(2 / pi) (x + CUBIC x^3)).
constexpr double TWICE_SQRT_2_PI = 2 * M_2_SQRTPI * M_SQRT1_2, CUBIC = 0.044715;

template <class C>
void activate(Activation activation, C* x, int64_t n) {
  using V = Vec<C>;
  switch (activation) {
    case Activation::relu:
      return elementwise(x, n, [](V v) { return v < 0 ? V{} : v; });
    case Activation::gelu:
      return elementwise(x, n, [](V v) { return v * normal_share(v); });
    case Activation::gelu_tanh:
      return elementwise(x, n, [](V v) { return v * logistic(C(TWICE_SQRT_2_PI) * v * (1 + C(CUBIC) * v * v)); });
    case Activation::silu:
      return elementwise(x, n, [](V v) { return v * logistic(v); });
    case Activation::tanh:
      return elementwise(x, n, [](V v) { return hyperbolic_tangent(v); });
    case Activation::identity:
      return;
  }
}

template <class C>
void slope(Activation activation, C* x, int64_t n) {
  using V = Vec<C>;
  switch (activation) {
    case Activation::relu:
      return elementwise(x, n, [](V v) { return v <= 0 ? V{} : splat(C(1)); });
    case Activation::gelu:
      return elementwise(x, n, [](V v) {
        return normal_share(v) + v * C(0.5 * M_2_SQRTPI * M_SQRT1_2) * exponential(C(-0.5) * v * v);
      });
    case Activation::gelu_tanh:
      return elementwise(x, n, [](V v) {
        V share = logistic(C(TWICE_SQRT_2_PI) * v * (1 + C(CUBIC) * v * v));
        return share + v * share * (1 - share) * C(TWICE_SQRT_2_PI) * (1 + C(3 * CUBIC) * v * v);
      });
    case Activation::silu:
      return elementwise(x, n, [](V v) {
        V share = logistic(v);
        return share + v * share * (1 - share);
      });
    case Activation::tanh:
      return elementwise(x, n, [](V v) {
        V value = hyperbolic_tangent(v);
        return 1 - value * value;
      });
    case Activation::identity:
      return elementwise(x, n, [](V) { return splat(C(1)); });
  }
}

template <class C>
constexpr Kernels<C> table = {WIDTH<C>, Simd<C>::lanes, widen<C>,     narrow<C>, dot<C>,      axpy<C>,         project<C>,
                              copy<C>,  transpose<C>,   add<C>,       multiply<C>, multiply_add<C>, drop<C>, activate<C>,
                              slope<C>};
#undef SHUFFLE

}  // namespace pyfastpeft::ISA
