// The kernels that are compiled once per instruction set, as a table chosen at run time.
#pragma once
#include <algorithm>
#include <cstdint>

namespace pyfastpeft {

enum class Dtype : int { f64, f32, bf16, f16 };

// What stands between the two halves of a bottleneck; reference.ACTIVATIONS names them in this order.
enum class Activation : int { relu, gelu, gelu_tanh, silu, tanh, identity };

inline int64_t item_size(Dtype t) { return t == Dtype::f64 ? 8 : t == Dtype::f32 ? 4 : 2; }

// Rows of memory, whose cache lines are asked for in shares while other memory is used.
class Upcoming {
 public:
  Upcoming() = default;
  Upcoming(const char* row, int64_t stride, int64_t rows, int64_t bytes, int64_t shares)
      : row_(row), stride_(stride), rows_(rows), lines_((bytes + LINE - 1) / LINE) {
    share_ = (rows_ * lines_ + shares - 1) / std::max<int64_t>(shares, 1);
  }

  void ask(int64_t shares = 1) {
    for (int64_t i = shares * share_; i > 0 && rows_ > 0; --i) {
      __builtin_prefetch(row_ + line_ * LINE, 0, 2);
      if (++line_ == lines_) line_ = 0, --rows_, row_ += stride_;
    }
  }

 private:
  static constexpr int64_t LINE = 64;  // bytes
  const char* row_ = nullptr;
  int64_t stride_ = 0, rows_ = 0, lines_ = 0, share_ = 0, line_ = 0;
};

// What is asked for meanwhile. c, y: rows used a call later, by the elements from this call's to them; 0: none are. block:
// a share for every STEPS of the depth, and the rows of y once.
struct Next {
  static constexpr int64_t STEPS = 16;
  int64_t c = 0, y = 0;
  Upcoming* block = nullptr;
};

// Sums are formed in C: double for f64, float for all others.
template <class C>
struct Kernels {
  int64_t width;  // columns of y for which axpy reads c once
  int64_t lanes;  // elements of a vector
  // out[i] = in[i] for i < n; in is of the given dtype.
  void (*widen)(Dtype, const void* in, C* out, int64_t n);
  // out[i] = in[i], rounded to nearest even; out is of the given dtype.
  void (*narrow)(Dtype, const C* in, void* out, int64_t n);
  // s[t][j] = sum over k of x[t][k] a[j][k] for t < tokens, j < ranks; x and s hold row pointers, a is [ranks, k] of the
  // given dtype with row stride lda. Where x's rows lie `stride` apart, not 0, those after them are asked for.
  void (*dot)(const C* const* x, int64_t stride, int64_t tokens, Dtype, const void* a, int64_t lda, int64_t ranks,
              int64_t k, C* const* s);
  // y[i][n] (+)= sum over q of s[i][q * step] c[q * ldc + n] for i < rows, q < depth, n < columns; s and y hold row
  // pointers.
  void (*axpy)(const C* const* s, int64_t step, int64_t rows, const C* c, int64_t ldc, int64_t depth, C* const* y,
               int64_t columns, bool accumulate, Next);
  // y[n] += sum over r of s[r] b[n * ldb + r] for r < rank, n < columns.
  void (*project)(const C* s, const C* b, int64_t ldb, int64_t rank, C* y, int64_t columns);
  // out[i * ldo + j] = scale[i] * in[i * ldi + j] for i < rows, j < columns, without `scale` as if it were 1; in is of the
  // given dtype, out may be in.
  void (*copy)(Dtype, const void* in, int64_t ldi, int64_t rows, int64_t columns, const C* scale, C* out, int64_t ldo);
  // out[j * ldo + i] = scale * in[i * ldi + j] for i < rows, j < columns; in is of the given dtype.
  void (*transpose)(Dtype, const void* in, int64_t ldi, int64_t rows, int64_t columns, C scale, C* out, int64_t ldo);
  // x[i] += b[i] for i < n.
  void (*add)(C* x, const C* b, int64_t n);
  // out[i] = x[i] l[i] for i < n; out may be x.
  void (*multiply)(const C* x, const C* l, C* out, int64_t n);
  // sum[i] += a[i] b[i] for i < n.
  void (*multiply_add)(const C* a, const C* b, C* sum, int64_t n);
  // x[i] *= kept(seed; token, k0 + i) ? 1 / (1 - p) : 0 for i < n; k0 is a multiple of 4. The mask is that of
  // reference.dropout_factor: word k mod 4 of Philox4x32-10 under counter (k / 4, token, 0, 0).
  void (*drop)(C* x, int64_t n, int64_t k0, int64_t token, uint64_t seed, double p);
  // x[i] = phi(x[i]) for i < n.
  void (*activate)(Activation, C* x, int64_t n);
  // x[i] = phi'(x[i]) for i < n.
  void (*slope)(Activation, C* x, int64_t n);
};

template <class C>
const Kernels<C>& kernels();

// "baseline", "avx2" or "avx512": the best that the CPU has, or the lower one that PYFASTPEFT_CPU_ISA names.
const char* cpu_capability();

// Whether torch's own matmul is fast in this dtype: for 16-bit ones where the CPU multiplies them in hardware, for float32
// where its library is one for this CPU. PYFASTPEFT_CPU_MATMUL, "own" or "torch", decides for float32.
bool fast_matmul(Dtype);

}  // namespace pyfastpeft
