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
#include <new>
#include <string>
#include <vector>

#include "ops/cpu/tasks.h"

namespace pyfastpeft {

namespace {

template <class C>
Tensor view(const Matrix<C>& m) {
  int64_t sizes[] = {m.rows, m.columns}, strides[] = {m.row_stride, m.column_stride};
  return torch::stable::from_blob(m.data, {sizes, 2}, {strides, 2},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU, 0),
                                  sizeof(C) == 8 ? ScalarType::Double : ScalarType::Float);
}

// One factor is cut into panels as wide as a tile of the kernels, a power of two up to COLUMNS, those of the weight packed
// by STEP: the input, where it has up to SOME rows and those of the weight lie along the depth, else mostly the weight.
// Panels stay in the second cache. Up to FEW rows, or half as many, go without. ROWS are those of a tile, of which up to
// SHARED, as many columns of whole vectors, are read beside panels of the input.
// With many rows the next block of the weight is asked for during the LATE last tiles: theirs would drive it out again.
// Up to TALL rows are gone through at a time; where they have more than CACHED elements, which are read from memory for
// each block of COLUMNS, by TOGETHER such blocks for each part of the depth in turn.
constexpr int64_t STEP = 32, COLUMNS = 64, ROWS = 6, FEW = 2 * ROWS, SOME = 128, SHARED = 48, LATE = 8;
constexpr int64_t TALL = 1024, CACHED = 4 << 20, TOGETHER = 4;
static_assert(SHARED % ROWS == 0 && SHARED <= COLUMNS);

// Floats from the start of a cache line on, so that no vector of a panel lies on two.
struct Freed {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t(64)); }
};
using Memory = std::unique_ptr<float[], Freed>;
Memory memory(int64_t n) { return Memory(new (std::align_val_t(64)) float[n]); }

bool has_unit_stride(const Tensor& w) {
  return w.stride(0) == 1 || w.stride(1) == 1 || w.size(0) == 1 || w.size(1) == 1;
}

enum class Panels { none, input, weight };

// How deep panels are at most: a page of a row that is read beside them, or less for more panels of the weight.
int64_t depth_of(Panels panels) { return panels == Panels::input ? 1024 : 768; }

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
  // What panels are made of for an input of m rows: nothing, where these are too few to pay for it, or fewer where each
  // reading casts the weight; of the smaller factor, where its panels are as wide as tiles.
  Panels panels(int64_t m, bool add) const {
    if (!along_p() || m > SOME) return Panels::weight;
    if (m <= (dtype == Dtype::f32 ? FEW : FEW / 2) && !scale && !add) return Panels::none;
    return q < m && q % kernels<float>().width == 0 ? Panels::weight : Panels::input;
  }
  const char* at(int64_t row, int64_t column) const {
    return data + (row * stride_q + column * stride_p) * item_size(dtype);
  }
};

// The input in panels, transposed: [P / depth][M / width][depth][width], with zeros up to whole vectors.
class InputPanels {
 public:
  InputPanels(const Rows& in, int64_t m, const Factor& w)
      : m_(blocks(m, k_.lanes) * k_.lanes), p_(w.p), data_(memory(m_ * p_)) {
    int64_t across = blocks(m, k_.width), tasks = across * blocks(p_, depth_);
    torch::stable::parallel_for(0, tasks, m * p_ < 4 * SERIAL_WORK ? tasks : 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        int64_t p0 = task / across * depth_, t0 = task % across * k_.width, n = std::min(k_.width, m - t0);
        pack({in.dtype, in.at(t0, p0), in.stride}, n, std::min(depth_, p_ - p0), w.scale ? w.scale + p0 : nullptr,
             const_cast<float*>(at(t0, p0)), columns(t0));
      }
    });
  }
  int64_t rows() const { return m_; }
  int64_t columns(int64_t t) const { return std::min(k_.width, m_ - t); }
  const float* at(int64_t t, int64_t p0) const { return data_.get() + p0 * m_ + t * std::min(depth_, p_ - p0); }

 private:
  const int64_t depth_ = depth_of(Panels::input);
  const Kernels<float>& k_ = kernels<float>();
  int64_t m_, p_;
  Memory data_;
};

// out[t][j] (+)= sum over p of in[t][p] w[q0 + j][p] for t < m, j < n; the rows of w from next_q on, where
// there are any, are those of the product after this one.  in, out: float32; in is not read where there are panels of it
class Product {
 public:
  Product(const Factor& w, Panels panels, const InputPanels* input)
      : w_(w),
        kind_(panels),
        depth_(depth_of(panels)),
        input_(input),
        memory_(memory(panels == Panels::input    ? 2 * SHARED * input->rows() + ROWS * depth_
                       : panels == Panels::weight ? depth_ * COLUMNS
                                                  : 0)) {}

  void operator()(const Rows& in, int64_t m, int64_t q0, int64_t n, const Rows& out, bool add, int64_t next_q) {
    if (kind_ == Panels::none) {
      tile(in, out, 0, m, 0, 0);
      return k_.dot(from_, 0, m, w_.dtype, w_.at(q0, 0), w_.stride_q, n, w_.p, to_);
    }
    for (int64_t p0 = 0; p0 < w_.p; p0 += depth_)
      for (int64_t j = 0; j < n; j += COLUMNS) slice(in, m, q0, n, p0, j, out, add, next_q);
    if (input_) transpose(m, n, out, add);
  }

 private:
  // Of the n columns those from j on, up to COLUMNS of them, and of the depth what begins at p0.
  void slice(const Rows& in, int64_t m, int64_t q0, int64_t n, int64_t p0, int64_t j, const Rows& out, bool add,
             int64_t next_q) {
    int64_t depth = std::min(depth_, w_.p - p0), first = std::min(n, COLUMNS), left = n - j - COLUMNS;
    auto upcoming = [&](int64_t shares) {
      if (left > 0) return block(q0 + j + COLUMNS, std::min(left, COLUMNS), p0, shares);
      return p0 + depth < w_.p ? block(q0, first, p0 + depth, shares) : block(next_q, first, 0, shares);
    };
    if (input_) return combine(q0, n, p0, depth, upcoming(blocks(n, ROWS) * blocks(m, k_.width) * (depth / Next::STEPS)));
    int64_t tiles = m / ROWS, late = std::min(tiles, LATE), packs = tiles == late ? blocks(depth, STEP) : 0;
    q0 += j, n = std::min(n - j, COLUMNS);
    Upcoming next = upcoming(blocks(n, k_.width) * (packs + late * (depth / Next::STEPS))), none;
    for (int64_t i = 0; i < n; i += k_.width) {
      for (int64_t p = 0; p < depth; p += STEP) {
        pack(q0 + i, std::min(k_.width, n - i), p0 + p, std::min(STEP, depth - p), panel(i, depth) + p * k_.width);
        if (packs) next.ask();
      }
    }
    for (int64_t t = 0; t < m; t += ROWS) {
      int64_t count = std::min(ROWS, m - t);
      for (int64_t i = 0; i < n; i += k_.width) {
        tile(in, out, t, count, p0, j + i);
        multiply(count, panel(i, depth), depth, std::min(k_.width, n - i), add || p0 > 0,
                 {0, ROWS * out.stride, t / ROWS < tiles - late ? &none : &next});
      }
    }
  }

  // Rows of the weight that are read after those of now.
  Upcoming block(int64_t q0, int64_t n, int64_t p0, int64_t shares) const {
    int64_t depth = std::min(depth_, w_.p - p0), size = item_size(w_.dtype);
    n = std::min(n, w_.q - q0);
    if (w_.along_p()) return {w_.at(q0, p0), w_.stride_q * size, n, depth * size, shares};
    return {w_.at(q0, p0), w_.stride_p * size, depth, n * size, shares};
  }

  // The transpose of the block of out, with rows of whole vectors.
  void combine(int64_t q0, int64_t n, int64_t p0, int64_t depth, Upcoming next) {
    float *sums = memory_.get(), *wide = sums + 2 * SHARED * input_->rows();
    const float* from[ROWS];
    float* to[ROWS];
    for (int64_t j = 0; j < n; j += ROWS) {
      int64_t count = std::min(ROWS, n - j);
      for (int64_t i = 0; i < count; ++i) {
        const char* row = w_.at(q0 + j + i, p0);
        from[i] = w_.dtype == Dtype::f32 ? reinterpret_cast<const float*>(row) : wide + i * depth;
        if (w_.dtype != Dtype::f32) k_.widen(w_.dtype, row, wide + i * depth, depth);
      }
      for (int64_t t = 0; t < input_->rows(); t += k_.width) {
        int64_t width = input_->columns(t);
        for (int64_t i = 0; i < count; ++i) to[i] = sums + (j + i) * input_->rows() + t;
        // Rows that are cast are asked for: casting waits for memory, products by rows as they lie hardly do.
        k_.axpy(from, 1, count, input_->at(t, p0), width, depth, to, width, p0 > 0,
                {0, 0, w_.dtype == Dtype::f32 ? nullptr : &next});
      }
    }
  }

  void transpose(int64_t m, int64_t n, const Rows& out, bool add) {
    float *to = reinterpret_cast<float*>(out.data), *sums = memory_.get() + n * input_->rows();
    int64_t stride = add ? n : out.stride;
    for (int64_t t = 0; t < m; t += 8)  // rows of out; more evict one another where they lie a power of two apart
      k_.transpose(Dtype::f32, memory_.get() + t, input_->rows(), n, std::min<int64_t>(8, m - t), 1,
                   (add ? sums : to) + t * stride, stride);
    for (int64_t t = 0; add && t < m; ++t) k_.add(to + t * out.stride, sums + t * n, n);
  }

  float* panel(int64_t j, int64_t depth) { return memory_.get() + j * depth; }

  void tile(const Rows& in, const Rows& out, int64_t t, int64_t count, int64_t p, int64_t j) {
    for (int64_t i = 0; i < count; ++i) {
      from_[i] = reinterpret_cast<const float*>(in.at(t + i, p));
      to_[i] = reinterpret_cast<float*>(out.at(t + i, j));
    }
  }

  // panel[i][j] = scale[p0 + i] w[q0 + j][p0 + i] for i < depth, j < n, and 0 for n <= j < width.
  void pack(int64_t q0, int64_t n, int64_t p0, int64_t depth, float* panel) {
    const float* scale = w_.scale ? w_.scale + p0 : nullptr;
    Rows from{w_.dtype, const_cast<char*>(w_.at(q0, p0)), w_.along_p() ? w_.stride_q : w_.stride_p};
    if (w_.along_p()) return pyfastpeft::pack(from, n, depth, scale, panel, k_.width);
    k_.copy(from.dtype, from.data, from.stride, depth, n, scale, panel, k_.width);
    pad(panel, depth, n, k_.width);
  }

  void multiply(int64_t count, const float* panel, int64_t depth, int64_t n, bool add, Next next) {
    int64_t width = k_.width;
    if (n == width) return k_.axpy(from_, 1, count, panel, width, depth, to_, n, add, next);
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
  Panels kind_;
  int64_t depth_;  // of a panel
  const InputPanels* input_;
  Memory memory_;  // panels of the weight; with those of the input, sums, twice, and cast rows
  const float* from_[FEW];
  float* to_[FEW];
};

// The columns in products, about equally wide, of whole units: up to `together` of them, and as many for every thread.
// input: the elements of it that they go through
class Columns {
 public:
  Columns(int64_t q, Panels panels, int64_t input) : unit_(COLUMNS) {
    int64_t together = input > CACHED ? TOGETHER : 1, threads = torch::stable::get_num_threads();
    if (panels == Panels::input) unit_ = ROWS, together = SHARED / ROWS;
    int64_t least = panels == Panels::weight ? kernels<float>().width : 16;
    while (unit_ > least && blocks(q, unit_) < 2 * threads) unit_ /= 2;
    q_ = q, units_ = blocks(q, unit_);
    count_ = std::min(units_, blocks(blocks(units_, together), threads) * threads);
  }
  int64_t count() const { return count_; }
  int64_t width() const { return blocks(units_, count_) * unit_; }
  int64_t begin(int64_t i) const { return std::min(i * units_ / count_ * unit_, q_); }

 private:
  int64_t unit_, units_, q_, count_;
};

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
  Panels panels = weight.panels(m, bool(start));
  std::unique_ptr<InputPanels> input(panels == Panels::input ? new InputPanels(in, m, weight) : nullptr);
  // Rows are shared out, too, where columns leave threads idle, or where so many are in no cache.
  Columns columns(q, panels, std::min(m, TALL) * weight.p);
  int64_t least = blocks(2 * torch::stable::get_num_threads(), columns.count());
  int64_t parts = std::max(blocks(m, TALL), std::min(least, blocks(m, 8 * ROWS)));
  int64_t height = input ? m : blocks(blocks(m, parts), ROWS) * ROWS;
  parts = blocks(m, height);
  // Threads do their last columns by a few rows at a time, so that none waits long for another.
  int64_t run = height >= 4 * LATE * ROWS && torch::stable::get_num_threads() > 1 ? 4 : 1;
  int64_t few = blocks(blocks(height, run), ROWS) * ROWS;
  share_out(columns.count() * parts * run, run, m * q * weight.p < SERIAL_WORK, [&](auto take, auto upcoming) {
    Product product(weight, panels, input.get());
    for (Run tasks; (tasks = take()).count;) {
      int64_t part = tasks.begin / run, block = part / parts, next = upcoming(), first = part % parts * height;
      int64_t q0 = columns.begin(block), n = columns.begin(block + 1) - q0, t0 = first + tasks.begin % run * few;
      int64_t count = std::min({tasks.count * few, first + height - t0, m - t0});
      if (count <= 0) continue;
      Rows from{in.dtype, in.at(t0), in.stride}, to{out.dtype, out.at(t0, q0), out.stride};
      if (start && start.data != out.data)
        for (int64_t t = 0; t < count; ++t) std::memcpy(to.at(t), start.at(t0 + t, q0), n * sizeof(float));
      product(from, count, q0, n, to, bool(start), next < 0 ? q : columns.begin(next / run / parts));
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
  Panels panels = weight.panels(m, false);
  std::unique_ptr<InputPanels> input(panels == Panels::input ? new InputPanels(rows, m, weight) : nullptr);
  Columns columns(weight.q, panels, m * weight.p);
  share_out(columns.count(), 1, false, [&](auto take, auto upcoming) {
    Product product(weight, panels, input.get());
    Buffer<float> sums(m, columns.width());
    for (Run tasks; (tasks = take()).count;) {
      int64_t task = tasks.begin, q0 = columns.begin(task), n = columns.begin(task + 1) - q0, next = upcoming();
      product(rows, m, q0, n, sums.rows(), false, next < 0 ? weight.q : columns.begin(next));
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
