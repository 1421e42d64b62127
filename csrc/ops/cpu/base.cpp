#include "ops/cpu/base.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

namespace pyfastpeft {

namespace {

template <class C>
Tensor view(const Matrix<C>& m) {
  int64_t sizes[] = {m.rows, m.columns}, strides[] = {m.row_stride, m.column_stride};
  return torch::stable::from_blob(m.data, {sizes, 2}, {strides, 2},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU, 0),
                                  sizeof(C) == 8 ? ScalarType::Double : ScalarType::Float);
}

// A block of the weight is cut into panels as wide as a tile of the kernels, a power of two up to COLUMNS; they stay in
// the second cache, packed by STEP. ROWS are those of a tile; up to FEW rows, or half as many, go without panels.
constexpr int64_t DEPTH = 768, STEP = 32, COLUMNS = 64, ROWS = 6, FEW = 2 * ROWS;

bool has_unit_stride(const Tensor& w) {
  return w.stride(0) == 1 || w.stride(1) == 1 || w.size(0) == 1 || w.size(1) == 1;
}

// The weight as [Q, P], of whose rows a product is made: itself, or for `transposed` its transpose.
struct Factor {
  Dtype dtype;
  const char* data;
  int64_t q, p, stride_q, stride_p;
  const float* scale;  // [P], of the columns; or none

  Factor(const Tensor& w, bool transposed, const float* scale = nullptr)
      : dtype(dtype_of(w, "weight")),
        data(static_cast<const char*>(w.const_data_ptr())),
        q(w.size(transposed)),
        p(w.size(!transposed)),
        stride_q(w.stride(transposed)),
        stride_p(w.stride(!transposed)),
        scale(scale) {}
  bool along_p() const { return stride_p == 1 || p == 1; }
  // Whether rows of w are read as they lie: for m too few to pay for panels, fewer where each reading casts them.
  bool unpacked(int64_t m) const { return m <= (dtype == Dtype::f32 ? FEW : FEW / 2) && along_p() && !scale; }
  const char* at(int64_t row, int64_t column) const {
    return data + (row * stride_q + column * stride_p) * item_size(dtype);
  }
};

// A block of the weight, whose cache lines are asked for in shares, while the block before it is packed and multiplied.
class Upcoming {
 public:
  Upcoming(const Factor& w, int64_t q0, int64_t n, int64_t p0, int64_t depth, int64_t shares)
      : row_(w.at(q0, p0)),
        stride_((w.along_p() ? w.stride_q : w.stride_p) * item_size(w.dtype)),
        rows_(w.along_p() ? n : depth),
        lines_(blocks((w.along_p() ? depth : n) * item_size(w.dtype), LINE)),
        share_(blocks(rows_ * lines_, shares)) {}

  void ask() {
    for (int64_t i = 0; i < share_ && rows_ > 0; ++i) {
      __builtin_prefetch(row_ + line_ * LINE, 0, 2);
      if (++line_ == lines_) line_ = 0, --rows_, row_ += stride_;
    }
  }

 private:
  static constexpr int64_t LINE = 64;  // bytes
  const char* row_;
  int64_t stride_, rows_, lines_, share_, line_ = 0;
};

// out[t][j] (+)= sum over p of in[t][p] w[q0 + j][p] for t < m, j < n <= COLUMNS; the rows of w from next_q on, where
// there are any, are those of the product after this one.  in, out: float32
class Product {
 public:
  Product(const Factor& w, bool unpacked)
      : w_(w), unpacked_(unpacked), panels_(new float[unpacked ? 0 : DEPTH * COLUMNS]) {}

  void operator()(const Rows& in, int64_t m, int64_t q0, int64_t n, const Rows& out, bool add, int64_t next_q) {
    if (unpacked_) {
      tile(in, out, 0, m, 0, 0);
      return k_.dot(from_, 0, m, w_.dtype, w_.at(q0, 0), w_.stride_q, n, w_.p, to_);
    }
    for (int64_t p0 = 0; p0 < w_.p; p0 += DEPTH) {
      int64_t depth = std::min(DEPTH, w_.p - p0);
      bool last = p0 + depth == w_.p;
      int64_t next = last ? next_q : q0, next_p = last ? 0 : p0 + depth;
      Upcoming upcoming(w_, next, std::min(n, w_.q - next), next_p, std::min(DEPTH, w_.p - next_p),
                        (blocks(depth, STEP) + blocks(m, ROWS)) * blocks(n, k_.width));
      for (int64_t j = 0; j < n; j += k_.width) {
        for (int64_t p = 0; p < depth; p += STEP) {
          pack(q0 + j, std::min(k_.width, n - j), p0 + p, std::min(STEP, depth - p), panel(j, depth) + p * k_.width);
          upcoming.ask();
        }
      }
      for (int64_t t = 0; t < m; t += ROWS) {
        int64_t count = std::min(ROWS, m - t);
        for (int64_t j = 0; j < n; j += k_.width) {
          upcoming.ask();
          tile(in, out, t, count, p0, j);
          multiply(count, panel(j, depth), depth, std::min(k_.width, n - j), add || p0 > 0);
        }
      }
    }
  }

 private:
  float* panel(int64_t j, int64_t depth) { return panels_.get() + j * depth; }

  void tile(const Rows& in, const Rows& out, int64_t t, int64_t count, int64_t p, int64_t j) {
    for (int64_t i = 0; i < count; ++i) {
      from_[i] = reinterpret_cast<const float*>(in.at(t + i, p));
      to_[i] = reinterpret_cast<float*>(out.at(t + i, j));
    }
  }

  // panel[i][j] = w[q0 + j][p0 + i] for i < depth, j < n, and 0 for n <= j < width.
  void pack(int64_t q0, int64_t n, int64_t p0, int64_t depth, float* panel) {
    int64_t width = k_.width;
    if (w_.along_p()) {
      k_.transpose(w_.dtype, w_.at(q0, p0), w_.stride_q, n, depth, 1, panel, width);
    } else {
      for (int64_t i = 0; i < depth; ++i) k_.widen(w_.dtype, w_.at(q0, p0 + i), panel + i * width, n);
    }
    if (!w_.scale && n == width) return;
    for (int64_t i = 0; i < depth; ++i) {
      float* row = panel + i * width;
      for (int64_t j = 0; w_.scale && j < n; ++j) row[j] *= w_.scale[p0 + i];
      std::fill(row + n, row + width, 0.0f);
    }
  }

  void multiply(int64_t count, const float* panel, int64_t depth, int64_t n, bool add) {
    int64_t width = k_.width;
    if (n == width) return k_.axpy(from_, 1, count, panel, width, depth, to_, n, add, {});
    float whole[ROWS * COLUMNS];  // the kernel's vectors are faster than what it does with a rest of columns
    float* rows[ROWS];
    for (int64_t i = 0; i < count; ++i) rows[i] = whole + i * width;
    k_.axpy(from_, 1, count, panel, width, depth, rows, width, false, {});
    for (int64_t i = 0; i < count; ++i) {
      if (add) k_.add(rows[i], to_[i], n);
      std::copy_n(rows[i], n, to_[i]);
    }
  }

  const Kernels<float>& k_ = kernels<float>();
  const Factor& w_;
  bool unpacked_;
  std::unique_ptr<float[]> panels_;
  const float* from_[FEW];
  float* to_[FEW];
};

// Columns of a block: fewer than COLUMNS where these would leave threads idle.
int64_t block_columns(int64_t q, bool unpacked) {
  int64_t block = COLUMNS, least = unpacked ? 16 : kernels<float>().width, threads = torch::stable::get_num_threads();
  while (block > least && blocks(q, block) < 2 * threads) block /= 2;
  return block;
}

}  // namespace

Tensor as_matrix(const Tensor& t, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride) {
  int64_t sizes[] = {rows, columns}, strides[] = {row_stride, column_stride};
  AtenTensorHandle view;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), 2, sizes, strides, 0, &view));
  return Tensor(view);
}

// New memory of many pages costs more to be given page by page than to be written: large outputs, as logits are, ask for
// huge pages, which Linux gives on request where it does not by itself.
static void ask_for_huge_pages(const Tensor& y) {
#ifdef __linux__
  constexpr uintptr_t LARGE = 32 << 20, HUGE_PAGE = 2 << 20;  // from LARGE on malloc takes memory from the system
  uintptr_t size = y.numel() * item_size(dtype_of(y, "y")), begin = (uintptr_t)y.const_data_ptr(), end = begin + size;
  begin = (begin + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  if (size > LARGE) madvise((void*)begin, end / HUGE_PAGE * HUGE_PAGE - begin, MADV_HUGEPAGE);
#endif
}

Tensor empty_rows(const Tensor& x, int64_t features) {
  int32_t dtype;
  AtenTensorHandle made;
  auto lead = x.sizes();
  std::vector<int64_t> sizes(lead.begin(), lead.end()), strides(lead.size(), 1);
  sizes.back() = features;
  for (size_t i = sizes.size() - 1; i-- > 0;) strides[i] = strides[i + 1] * sizes[i + 1];
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), dtype,
                                                  aoti_torch_device_type_cpu(), 0, &made));
  Tensor y(made);
  ask_for_huge_pages(y);
  return y;
}

bool prefers_own_matmul(const Tensor& in, const Tensor& w, const Tensor& out) {
  auto is_float = [](const Tensor& t) { return t.scalar_type() == ScalarType::Float; };
  auto has_rows = [](const Tensor& t) { return t.stride(1) == 1 || t.size(1) == 1; };
  if (fast_matmul(Dtype::f32) || !is_float(in) || !is_float(w) || !is_float(out)) return false;
  return has_rows(in) && has_rows(out) && has_unit_stride(w);
}

void own_matmul(const Tensor& x, const Tensor& w, bool transposed, const OptionalTensor& bias, Tensor& y,
                const float* scale) {
  Factor weight(w, transposed, scale);
  int64_t m = x.size(0), q = weight.q;
  Rows in = rows_of(x, m, weight.p, "x"), out = rows_of(y, m, q, "y"), start;
  const float* shift = nullptr;
  if (bias && bias->dim() == 1) {
    shift = sums<float>(*bias, {q}, "bias");
  } else if (bias) {
    start = rows_of(*bias, m, q, "bias");
    STD_TORCH_CHECK(start.dtype == Dtype::f32, "bias must be float32");
  }
  if (m == 0) return;
  bool unpacked = weight.unpacked(m) && !start;
  // Rows are shared out, too, where columns leave threads idle, or where so many are in no cache.
  int64_t width = block_columns(q, unpacked), columns = blocks(q, width), threads = torch::stable::get_num_threads();
  int64_t parts = std::max(blocks(m, 1024), std::min(blocks(2 * threads, columns), blocks(m, 8 * ROWS)));
  int64_t height = blocks(blocks(m, parts), ROWS) * ROWS;
  parts = blocks(m, height);
  int64_t work = m * q * weight.p, tasks = columns * parts;
  torch::stable::parallel_for(0, tasks, work < SERIAL_WORK ? tasks : 1, [&](int64_t begin, int64_t end) {
    Product product(weight, unpacked);
    for (int64_t task = begin; task < end; ++task) {
      int64_t q0 = task / parts * width, n = std::min(width, q - q0), t0 = task % parts * height;
      int64_t count = std::min(height, m - t0);
      Rows from{in.dtype, in.at(t0), in.stride}, to{out.dtype, out.at(t0, q0), out.stride};
      if (start && start.data != out.data)
        for (int64_t t = 0; t < count; ++t) std::memcpy(to.at(t), start.at(t0 + t, q0), n * sizeof(float));
      product(from, count, q0, n, to, bool(start), task + 1 < end ? (task + 1) / parts * width : q);
      for (int64_t t = 0; shift && t < count; ++t)
        kernels<float>().add(reinterpret_cast<float*>(to.at(t)), shift + q0, n);
    }
  });
}

void matmul(const Tensor& in, const Tensor& w, bool transposed, const OptionalTensor& bias, Tensor& out) {
  if (prefers_own_matmul(in, w, out)) return own_matmul(in, w, transposed, bias, out);
  Tensor second = transposed ? w : as_matrix(w, w.size(1), w.size(0), w.stride(1), w.stride(0));
  TORCH_ERROR_CODE_CHECK(bias ? aoti_torch_cpu_addmm_out(out.get(), bias->get(), in.get(), second.get(), 1, 1)
                              : aoti_torch_cpu_mm_out(out.get(), in.get(), second.get()));
}

template <class C>
void matmul(const Matrix<C>& left, const Matrix<C>& right, double alpha, double beta, const Matrix<C>& out) {
  Tensor to = view(out);
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(to.get(), to.get(), view(left).get(), view(right).get(), beta, alpha));
}

template void matmul(const Matrix<float>&, const Matrix<float>&, double, double, const Matrix<float>&);
template void matmul(const Matrix<double>&, const Matrix<double>&, double, double, const Matrix<double>&);

void matmul_upcast(const float* in, int64_t m, const Tensor& w, bool transposed,
                   const std::function<void(int64_t q0, int64_t n, Rows block)>& done) {
  if (!has_unit_stride(w)) return matmul_upcast(in, m, torch::stable::contiguous(w), transposed, done);
  Factor weight(w, transposed);
  Rows rows{Dtype::f32, reinterpret_cast<char*>(const_cast<float*>(in)), weight.p};
  bool unpacked = weight.unpacked(m);
  int64_t width = block_columns(weight.q, unpacked);
  torch::stable::parallel_for(0, blocks(weight.q, width), 1, [&](int64_t begin, int64_t end) {
    Product product(weight, unpacked);
    Buffer<float> sums(m, width);
    for (int64_t block = begin; block < end; ++block) {
      int64_t q0 = block * width, n = std::min(width, weight.q - q0);
      product(rows, m, q0, n, sums.rows(), false, block + 1 < end ? q0 + width : weight.q);
      done(q0, n, sums.rows());
    }
  });
}

void convert(Rows in, Rows out, int64_t rows, int64_t columns) {
  const auto& k = kernels<float>();
  torch::stable::parallel_for(0, rows, 1 + 65536 / columns, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (out.dtype == Dtype::f32) {
        k.widen(in.dtype, in.at(i), reinterpret_cast<float*>(out.at(i)), columns);
      } else {
        k.narrow(out.dtype, reinterpret_cast<const float*>(in.at(i)), out.at(i), columns);
      }
    }
  });
}

namespace {

std::string capability() { return cpu_capability(); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyfastpeft, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&capability));
}

}  // namespace pyfastpeft
