#include "ops/cpu/lowrank.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>

#include "ops/cpu/base.h"
#include "ops/cpu/tasks.h"

namespace pyfastpeft {

namespace {

constexpr int64_t TOKEN_BLOCK = 12;    // tokens of one task or one staged block: a multiple of every tile's height
constexpr int64_t COLUMN_BLOCK = 256;  // columns of one task at most
constexpr int64_t FEW_TOKENS = 4;      // up to here a transposed B does not pay
constexpr int64_t WIDE = 96, WIDE_BACKWARD = 64;  // ranks from which torch's products, which pack, are faster

template <class C>
std::unique_ptr<C[]> scratch(int64_t n) {
  return std::unique_ptr<C[]>(new C[n]);
}

// One adapter's block of work: tokens t0 .. t1, ranks r0 .. r1 or columns c0 .. c1, as the loop needs.
struct Task {
  const Adapter* adapter;
  int64_t index;  // of the adapter
  int64_t begin, end;
};

// Cuts `extent(adapter)` of every adapter into blocks.
template <class Extent>
std::vector<Task> cut(const std::vector<Adapter>& adapters, int64_t block, Extent extent) {
  std::vector<Task> tasks;
  for (size_t i = 0; i < adapters.size(); ++i) {
    int64_t size = extent(adapters[i]);
    for (int64_t begin = 0; begin < size; begin += block)
      tasks.push_back({&adapters[i], (int64_t)i, begin, std::min(begin + block, size)});
  }
  return tasks;
}

// Columns of one task, of n in all: so that threads have equally many tasks, and whole vectors.
int64_t column_block(int64_t n) {
  constexpr int64_t VECTORS = 64;
  int64_t threads = torch::stable::get_num_threads(), count = blocks(blocks(n, COLUMN_BLOCK), threads) * threads;
  return std::min(COLUMN_BLOCK, blocks(blocks(n, count), VECTORS) * VECTORS);
}

template <class F>
void parallel(const std::vector<Task>& tasks, int64_t work, F f) {
  share_out(tasks.size(), 1, work < SERIAL_WORK, [&](auto take, auto) {
    for (Run run; (run = take()).count;) f(tasks[run.begin]);
  });
}

template <class C>
int64_t multiply_adds(const Branch<C>& branch, int64_t features) {
  int64_t work = 0;
  for (const Adapter& adapter : branch.adapters) work += adapter.tokens.count * adapter.rank * features;
  return work;
}

// Elements from a row to the next, where rows to come are to be asked for: where they lie evenly, too many for a cache.
int64_t stride_ahead(const Rows& rows, const Tokens& tokens) {
  constexpr int64_t CACHED = 1 << 20;
  return tokens.order || tokens.count * rows.stride * item_size(rows.dtype) <= CACHED ? 0 : rows.stride;
}

// Row `token` of x, columns c0 .. c0 + n, as C: where it lies if it is of that type and whole, else staged.
template <class C>
const C* staged(const Rows& x, int64_t token, int64_t c0, int64_t n, const Dropout& dropout, C* stage) {
  if (x.dtype == native<C> && dropout.p == 0) return reinterpret_cast<const C*>(x.at(token, c0));
  kernels<C>().widen(x.dtype, x.at(token, c0), stage, n);
  if (dropout.p > 0) kernels<C>().drop(stage, n, c0, token, dropout.seed, dropout.p);
  return stage;
}

// Rows first .. first + n of b, `rank` wide, as C: where they lie if they are of that type, else in `stage`.
template <class C>
Rows dense(const Rows& b, int64_t first, int64_t n, int64_t rank, C* stage) {
  if (b.dtype == native<C>) return {b.dtype, b.at(first), b.stride};
  if (b.stride == rank) {
    kernels<C>().widen(b.dtype, b.at(first), stage, n * rank);
  } else {
    for (int64_t i = 0; i < n; ++i) kernels<C>().widen(b.dtype, b.at(first + i), stage + i * rank, rank);
  }
  return {native<C>, reinterpret_cast<char*>(stage), rank};
}

template <class C>
Matrix<C> matrix(const Rows& x, int64_t rows, int64_t columns) {
  return {reinterpret_cast<C*>(x.data), rows, columns, x.stride};
}

// The loops of this file as torch's products, of one adapter that all tokens go through. The activations are of C.
template <class C>
class Products {
 public:
  // Whether there are at least `rank` ranks and all of this can be done.
  static bool serve(const Branch<C>& branch, int64_t rank, std::initializer_list<Rows> activations) {
    if (branch.adapters.size() != 1 || branch.adapters[0].tokens.order || branch.adapters[0].rank < rank) return false;
    return std::all_of(activations.begin(), activations.end(), [](const Rows& x) { return !x || x.dtype == native<C>; });
  }

  explicit Products(const Branch<C>& branch)
      : adapter_(branch.adapters[0]), tokens_(adapter_.tokens.count), rank_(adapter_.rank) {}

  // s = x A^T
  void shrink(const Rows& x, int64_t k, C* s, int64_t s_stride) const {
    Factor a(adapter_.a, rank_, k);
    matmul(matrix<C>(x, tokens_, k), a.matrix.transposed(), 1, 0, {s, tokens_, rank_, s_stride});
  }

  // sums (+)= scaling * s B^T on columns n0 .. n0 + n
  void expand(const C* s, int64_t s_stride, int64_t n0, int64_t n, const Rows& sums, bool add) const {
    Factor b({adapter_.b.dtype, adapter_.b.at(n0), adapter_.b.stride}, n, rank_);
    matmul(left(s, s_stride), b.matrix.transposed(), adapter_.scaling, add, matrix<C>(sums, tokens_, n));
  }

  // ds = scaling * dy B * slope
  void shrink_gradient(const Rows& dy, int64_t n, const C* slope, const Shrunk<C>& ds) const {
    Factor b(adapter_.b, n, rank_);
    matmul(matrix<C>(dy, tokens_, n), b.matrix, adapter_.scaling, 0, {ds.data, tokens_, rank_, ds.stride});
    for (int64_t i = 0; slope && i < tokens_; ++i) kernels<C>().multiply(ds(i), slope + i * rank_, ds(i), rank_);
  }

  // to = scaling * v^T s, or its transpose
  void factor_gradient(const Rows& v, int64_t features, const C* s, int64_t s_stride, double scaling, bool transposed,
                       const Rows& to) const {
    Matrix<C> first = matrix<C>(v, tokens_, features), second = left(s, s_stride);
    if (transposed) std::swap(first, second);
    int64_t rows = first.columns, columns = second.columns;
    if (to.dtype == native<C>) return matmul(first.transposed(), second, scaling, 0, matrix<C>(to, rows, columns));
    Buffer<C> sums(rows, columns);
    matmul(first.transposed(), second, scaling, 0, matrix<C>(sums.rows(), rows, columns));
    for (int64_t i = 0; i < rows; ++i)
      kernels<C>().narrow(to.dtype, reinterpret_cast<C*>(sums.rows().at(i)), to.at(i), columns);
  }

  // dx = from + ds A
  void input_gradient(const Shrunk<C>& ds, int64_t k, const Rows& from, const Rows& dx) const {
    for (int64_t t = 0; from && from.data != dx.data && t < tokens_; ++t)
      std::copy_n(reinterpret_cast<const C*>(from.at(t)), k, reinterpret_cast<C*>(dx.at(t)));
    Factor a(adapter_.a, rank_, k);
    matmul(left(ds.data, ds.stride), a.matrix, 1, bool(from), matrix<C>(dx, tokens_, k));
  }

 private:
  // A factor as C: where it lies, or a copy.
  struct Factor {
    std::unique_ptr<C[]> copy;
    Matrix<C> matrix;

    Factor(const Rows& rows, int64_t count, int64_t columns)
        : copy(scratch<C>(rows.dtype == native<C> ? 0 : count * columns)),
          matrix(pyfastpeft::matrix<C>(dense(rows, 0, count, columns, copy.get()), count, columns)) {}
  };

  Matrix<C> left(const C* s, int64_t stride) const { return {const_cast<C*>(s), tokens_, rank_, stride}; }

  const Adapter& adapter_;
  int64_t tokens_, rank_;
};

// s[i] = drop(x[tokens[i]]) a[r0 .. r1]^T for the tokens begin .. end; row(i) is where s[i]'s rank r0 goes.
template <class C, class Row>
void shrink_block(const Rows& x, const Tokens& tokens, int64_t begin, int64_t end, int64_t k, const Dropout& dropout,
                  const Rows& a, int64_t r0, int64_t r1, Row row) {
  bool stage = x.dtype != native<C> || dropout.p > 0;
  auto buffer = scratch<C>(stage ? std::min(TOKEN_BLOCK, end - begin) * k : 0);
  for (int64_t t = begin; t < end; t += TOKEN_BLOCK) {
    const C* in[TOKEN_BLOCK];
    C* out[TOKEN_BLOCK];
    int64_t count = std::min(TOKEN_BLOCK, end - t);
    for (int64_t i = 0; i < count; ++i) {
      in[i] = staged(x, tokens[t + i], 0, k, dropout, buffer.get() + (stage ? i * k : 0));
      out[i] = row(t + i);
    }
    kernels<C>().dot(in, stage ? 0 : stride_ahead(x, tokens), count, a.dtype, a.at(r0), a.stride, r1 - r0, k, out);
  }
}

// Where the sums of a token are formed: in the target, if they can be, else in `buffer`. They begin with `from`.
template <class C>
C* begin_row(const Target<C>& to, int64_t token, int64_t n, bool in_place, C* buffer) {
  C* out = in_place ? reinterpret_cast<C*>((to.unscaled ? to.unscaled : to.y).at(token)) : buffer;
  if (to.from && to.from.at(token) != reinterpret_cast<char*>(out))
    kernels<C>().widen(to.from.dtype, to.from.at(token), out, n);
  return out;
}

template <class C>
void finish_row(const Target<C>& to, int64_t token, int64_t n, bool in_place, C* sums) {
  const auto& k = kernels<C>();
  if (to.unscaled && !in_place) k.narrow(to.unscaled.dtype, sums, to.unscaled.at(token), n);
  C* y = in_place ? reinterpret_cast<C*>(to.y.at(token)) : sums;
  if (to.scale) {
    k.multiply(sums, to.scale, y, n);
  } else if (y != sums) {
    std::copy_n(sums, n, y);
  }
  if (to.shift) k.add(y, to.shift, n);
  if (!in_place) k.narrow(to.y.dtype, y, to.y.at(token), n);
}

// The target with drop'(s[i] c) for a branch, on columns c0 .. c0 + n, where its memory begins; c is [rank, n] with row
// stride ldc.
template <class C, class Row>
void expand_block(Row s, int64_t rank, const C* c, int64_t ldc, const Target<C>& to, const Tokens& tokens, int64_t c0,
                  int64_t n, const Dropout& dropout) {
  constexpr int64_t ROWS = 6;
  const auto& k = kernels<C>();
  bool drops = dropout.p > 0, in_place = to.y.dtype == native<C> && !drops, accumulate = to.from && !drops;
  int64_t ahead = in_place ? ROWS * stride_ahead(to.unscaled ? to.unscaled : to.y, tokens) : 0;
  C buffer[ROWS * COLUMN_BLOCK], previous[COLUMN_BLOCK];
  for (int64_t t = 0; t < tokens.count; t += ROWS) {
    int64_t count = std::min(ROWS, tokens.count - t);
    const C* factors[ROWS];
    C* out[ROWS];
    for (int64_t i = 0; i < count; ++i) {
      factors[i] = s(t + i);
      out[i] = buffer + i * COLUMN_BLOCK;
      if (!drops) out[i] = begin_row(to, tokens[t + i], n, in_place, out[i]);
    }
    k.axpy(factors, 1, count, c, ldc, rank, out, n, accumulate, {0, ahead});
    for (int64_t i = 0; i < count; ++i) {
      if (drops) {
        k.drop(out[i], n, c0, tokens[t + i], dropout.seed, dropout.p);
        if (to.from) {
          k.widen(to.from.dtype, to.from.at(tokens[t + i]), previous, n);
          k.add(out[i], previous, n);
        }
      }
      finish_row(to, tokens[t + i], n, in_place, out[i]);
    }
  }
}

// The target with scaling * s[i] b^T for a branch, without a transposed b: for few tokens.  b: [n, rank] with row
// stride ldb
template <class C, class Row>
void project_block(Row s, double scaling, const C* b, int64_t ldb, int64_t rank, const Target<C>& to,
                   const Tokens& tokens, int64_t n) {
  auto scaled = scratch<C>(rank);
  bool in_place = to.y.dtype == native<C>;
  C buffer[COLUMN_BLOCK];
  for (int64_t t = 0; t < tokens.count; ++t) {
    for (int64_t r = 0; r < rank; ++r) scaled[r] = C(scaling) * s(t)[r];
    C* out = begin_row(to, tokens[t], n, in_place, buffer);
    kernels<C>().project(scaled.get(), b, ldb, rank, out, n);
    finish_row(to, tokens[t], n, in_place, out);
  }
}

// g = s^T drop(x) on columns c0 .. c0 + n: [rank, n] with row stride COLUMN_BLOCK.
template <class C, class Row>
void outer_block(Row s, int64_t rank, const Rows& x, const Tokens& tokens, int64_t c0, int64_t n, const Dropout& dropout,
                 C* g) {
  constexpr int64_t SUMS = 2048, WIDTH = 64, DEPTH = 24;  // of a step, which fits the first cache with its rows of x
  const auto& k = kernels<C>();
  std::vector<const C*> in(rank);
  std::vector<C*> out(rank);
  auto sums_at = [&](int64_t column) {
    for (int64_t r = 0; r < rank; ++r) out[r] = g + r * COLUMN_BLOCK + column;
  };
  if (x.dtype == native<C> && dropout.p == 0 && !tokens.order) {
    int64_t step = tokens.count > 1 ? s(1) - s(0) : 0, width = std::max(WIDTH, SUMS / rank / WIDTH * WIDTH);
    Next next{DEPTH * stride_ahead(x, tokens), 0};
    for (int64_t c = 0; c < n; c += width) {
      sums_at(c);
      for (int64_t t = 0; t < tokens.count; t += DEPTH) {
        for (int64_t r = 0; r < rank; ++r) in[r] = s(t) + r;
        k.axpy(in.data(), step, rank, reinterpret_cast<const C*>(x.at(t, c0 + c)), x.stride,
               std::min(DEPTH, tokens.count - t), out.data(), std::min(width, n - c), t > 0, next);
      }
    }
    return;
  }
  auto stage = scratch<C>(TOKEN_BLOCK * COLUMN_BLOCK), factors = scratch<C>(rank * TOKEN_BLOCK);  // x and s^T
  sums_at(0);
  for (int64_t r = 0; r < rank; ++r) in[r] = factors.get() + r * TOKEN_BLOCK;
  for (int64_t t = 0; t < tokens.count; t += TOKEN_BLOCK) {
    int64_t count = std::min(TOKEN_BLOCK, tokens.count - t);
    for (int64_t i = 0; i < count; ++i) {
      const C* row = s(t + i);
      for (int64_t r = 0; r < rank; ++r) factors[r * TOKEN_BLOCK + i] = row[r];
      C* to = stage.get() + i * COLUMN_BLOCK;
      const C* from = staged(x, tokens[t + i], c0, n, dropout, to);
      if (from != to) std::copy_n(from, n, to);
    }
    k.axpy(in.data(), 1, rank, stage.get(), COLUMN_BLOCK, count, out.data(), n, t > 0, {});
  }
}

}  // namespace

template <class C>
void shrink(const Branch<C>& branch, Rows x, C* s, int64_t s_stride) {
  int64_t k = branch.features_in;
  if (branch.dropout.p == 0 && Products<C>::serve(branch, WIDE, {x}))
    return Products<C>(branch).shrink(x, k, s, s_stride);
  // Few tokens leave threads idle unless the ranks are shared out instead.
  constexpr int64_t RANKS = 4;
  auto tasks = cut(branch.adapters, 1, [](const Adapter& a) {
    return a.tokens.count > 2 * TOKEN_BLOCK ? blocks(a.tokens.count, TOKEN_BLOCK) : blocks(a.rank, RANKS);
  });
  parallel(tasks, multiply_adds(branch, k), [&](const Task& task) {
    const Adapter& adapter = *task.adapter;
    int64_t t0 = 0, t1 = adapter.tokens.count, r0 = 0, r1 = adapter.rank;
    if (t1 > 2 * TOKEN_BLOCK) {
      t0 = task.begin * TOKEN_BLOCK;
      t1 = std::min(t0 + TOKEN_BLOCK, t1);
    } else {
      r0 = task.begin * RANKS;
      r1 = std::min(r0 + RANKS, r1);
    }
    shrink_block<C>(x, adapter.tokens, t0, t1, k, branch.dropout, adapter.a, r0, r1,
                    [&](int64_t i) { return s + adapter.tokens[i] * s_stride + r0; });
  });
}

template <class C>
void expand(const Branch<C>& branch, const C* s, int64_t s_stride, const Target<C>& to, int64_t n0, int64_t n1) {
  const auto& k = kernels<C>();
  Rows sums = to.unscaled ? to.unscaled : to.y;
  bool adds = !to.from || to.from.data == sums.data;
  if (adds && Products<C>::serve(branch, WIDE, {to.y, to.from, to.unscaled})) {
    int64_t n = n1 - n0;
    Products<C>(branch).expand(s, s_stride, n0, n, sums, bool(to.from));
    if (!to.unscaled && !to.scale && !to.shift) return;
    torch::stable::parallel_for(0, branch.adapters[0].tokens.count, 1 + 16384 / n, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) finish_row(to, t, n, true, reinterpret_cast<C*>(sums.at(t)));
    });
    return;
  }
  auto tasks = cut(branch.adapters, column_block(n1 - n0), [&](const Adapter&) { return n1 - n0; });
  parallel(tasks, multiply_adds(branch, n1 - n0), [&](const Task& task) {
    const Adapter& adapter = *task.adapter;
    int64_t rank = adapter.rank, n = task.end - task.begin;
    auto block = to.columns(task.begin);
    auto stage = scratch<C>(adapter.b.dtype == native<C> ? 0 : COLUMN_BLOCK * rank);
    Rows b = dense(adapter.b, n0 + task.begin, n, rank, stage.get());
    auto row = [&](int64_t i) { return s + adapter.tokens[i] * s_stride; };
    if (adapter.tokens.count <= FEW_TOKENS) {
      project_block(row, adapter.scaling, reinterpret_cast<const C*>(b.data), b.stride, rank, block, adapter.tokens, n);
      return;
    }
    auto c = scratch<C>(rank * COLUMN_BLOCK);
    k.transpose(native<C>, b.data, b.stride, n, rank, adapter.scaling, c.get(), COLUMN_BLOCK);
    expand_block<C>(row, rank, c.get(), COLUMN_BLOCK, block, adapter.tokens, n0 + task.begin, n, Dropout{});
  });
}

template <class C>
void expand_backward(const Branch<C>& branch, Rows dy, const C* s, int64_t s_stride, const std::vector<Shrunk<C>>& ds,
                     const Middle<C>& middle) {
  const auto& adapters = branch.adapters;
  int64_t n = branch.features_out;
  auto columns_of_b = cut(adapters, column_block(n), [n](const Adapter&) { return n; });
  bool products = Products<C>::serve(branch, WIDE_BACKWARD, {dy});

  if (!ds.empty() && products) {
    Products<C>(branch).shrink_gradient(dy, n, middle.slope, ds[0]);
  } else if (!ds.empty()) {
    std::vector<std::unique_ptr<C[]>> bt(adapters.size());
    for (size_t i = 0; i < adapters.size(); ++i) bt[i] = scratch<C>(adapters[i].rank * n);
    parallel(columns_of_b, multiply_adds(branch, n), [&](const Task& task) {
      const Adapter& adapter = *task.adapter;
      int64_t rank = adapter.rank, columns = task.end - task.begin;
      auto stage = scratch<C>(adapter.b.dtype == native<C> ? 0 : COLUMN_BLOCK * rank);
      Rows b = dense(adapter.b, task.begin, columns, rank, stage.get());
      kernels<C>().transpose(native<C>, b.data, b.stride, columns, rank, adapter.scaling,
                             bt[task.index].get() + task.begin, n);
    });
    auto tasks = cut(adapters, TOKEN_BLOCK, [](const Adapter& a) { return a.tokens.count; });
    parallel(tasks, multiply_adds(branch, n), [&](const Task& task) {
      const Adapter& adapter = *task.adapter;
      const Shrunk<C>& row = ds[task.index];
      int64_t rank = adapter.rank;
      Rows b{native<C>, reinterpret_cast<char*>(bt[task.index].get()), n};
      shrink_block<C>(dy, adapter.tokens, task.begin, task.end, n, Dropout{}, b, 0, rank, row);
      if (!middle.slope) return;
      for (int64_t i = task.begin; i < task.end; ++i) kernels<C>().multiply(row(i), middle.slope + i * rank, row(i), rank);
    });
  }
  if (!ds.empty() && middle.sum) {
    int64_t rank = adapters[0].rank;
    std::fill_n(middle.sum, rank, C(0));
    for (int64_t i = 0; i < adapters[0].tokens.count; ++i) kernels<C>().add(middle.sum, ds[0](i), rank);
  }

  if (products && adapters[0].db)
    return Products<C>(branch).factor_gradient(dy, n, s, s_stride, adapters[0].scaling, false, adapters[0].db);
  parallel(columns_of_b, multiply_adds(branch, n), [&](const Task& task) {
    const Adapter& adapter = *task.adapter;
    if (!adapter.db) return;
    int64_t columns = task.end - task.begin;
    auto g = scratch<C>(adapter.rank * COLUMN_BLOCK), row = scratch<C>(adapter.rank);
    outer_block<C>([&](int64_t i) { return s + adapter.tokens[i] * s_stride; }, adapter.rank, dy, adapter.tokens,
                   task.begin, columns, Dropout{}, g.get());
    for (int64_t c = 0; c < columns; ++c) {
      for (int64_t r = 0; r < adapter.rank; ++r) row[r] = adapter.scaling * g[r * COLUMN_BLOCK + c];
      kernels<C>().narrow(adapter.db.dtype, row.get(), adapter.db.at(task.begin + c), adapter.rank);
    }
  });
}

template <class C>
void shrink_backward(const Branch<C>& branch, const std::vector<Shrunk<C>>& ds, Rows x, Rows from, Rows dx) {
  int64_t k = branch.features_in;
  if (branch.dropout.p == 0 && Products<C>::serve(branch, WIDE_BACKWARD, {x, dx, from})) {
    Products<C> products(branch);
    const Adapter& adapter = branch.adapters[0];
    if (adapter.da) products.factor_gradient(x, k, ds[0].data, ds[0].stride, 1, true, adapter.da);
    if (dx) products.input_gradient(ds[0], k, from, dx);
    return;
  }
  auto tasks = cut(branch.adapters, column_block(k), [k](const Adapter&) { return k; });
  parallel(tasks, multiply_adds(branch, k), [&](const Task& task) {
    const Adapter& adapter = *task.adapter;
    const Shrunk<C>& factors = ds[task.index];
    int64_t columns = task.end - task.begin, rank = adapter.rank;
    auto c = scratch<C>(rank * COLUMN_BLOCK);
    if (adapter.da) {
      outer_block<C>(factors, rank, x, adapter.tokens, task.begin, columns, branch.dropout, c.get());
      for (int64_t r = 0; r < rank; ++r)
        kernels<C>().narrow(adapter.da.dtype, c.get() + r * COLUMN_BLOCK, adapter.da.at(r, task.begin), columns);
    }
    if (dx) {
      for (int64_t r = 0; r < rank; ++r)
        kernels<C>().widen(adapter.a.dtype, adapter.a.at(r, task.begin), c.get() + r * COLUMN_BLOCK, columns);
      auto block = Target<C>{dx, from}.columns(task.begin);
      expand_block<C>(factors, rank, c.get(), COLUMN_BLOCK, block, adapter.tokens, task.begin, columns, branch.dropout);
    }
  });
}

template <class C>
void backward(const Branch<C>& branch, Rows dy, Rows x, const C* s, int64_t s_stride, Rows from, Rows dx,
              const Middle<C>& middle) {
  const auto& adapters = branch.adapters;
  std::vector<std::unique_ptr<C[]>> memory;
  std::vector<Shrunk<C>> ds;
  if (dx || middle.sum || std::any_of(adapters.begin(), adapters.end(), [](const Adapter& a) { return bool(a.da); })) {
    for (const Adapter& adapter : adapters) {
      memory.push_back(scratch<C>(adapter.tokens.count * adapter.rank));
      ds.push_back({memory.back().get(), adapter.rank});
    }
  }
  expand_backward(branch, dy, s, s_stride, ds, middle);
  if (!ds.empty()) shrink_backward(branch, ds, x, from, dx);
}

template void shrink(const Branch<float>&, Rows, float*, int64_t);
template void shrink(const Branch<double>&, Rows, double*, int64_t);
template void expand(const Branch<float>&, const float*, int64_t, const Target<float>&, int64_t, int64_t);
template void expand(const Branch<double>&, const double*, int64_t, const Target<double>&, int64_t, int64_t);
template void expand_backward(const Branch<float>&, Rows, const float*, int64_t, const std::vector<Shrunk<float>>&,
                              const Middle<float>&);
template void expand_backward(const Branch<double>&, Rows, const double*, int64_t, const std::vector<Shrunk<double>>&,
                              const Middle<double>&);
template void shrink_backward(const Branch<float>&, const std::vector<Shrunk<float>>&, Rows, Rows, Rows);
template void shrink_backward(const Branch<double>&, const std::vector<Shrunk<double>>&, Rows, Rows, Rows);
template void backward(const Branch<float>&, Rows, Rows, const float*, int64_t, Rows, Rows, const Middle<float>&);
template void backward(const Branch<double>&, Rows, Rows, const double*, int64_t, Rows, Rows, const Middle<double>&);

}  // namespace pyfastpeft
