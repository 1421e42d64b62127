
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#include "group_tokens.h"
#include "ops/cpu/adapted_linear.h"
#include "ops/cpu/by_sums.h"
#include "ops/cpu/scale.h"

namespace pyfastpeft {

namespace {

// What is wrong with a routing or with ranks, if anything is: null where all is well.
const char* fault(const int64_t* order, int64_t tokens, const int64_t* segments, int64_t count, const int64_t* ranks,
                  int64_t rank) {
  if (segments[0] < 0 || segments[count] > tokens) return "segments must lie in order";
  std::vector<bool> seen(tokens, false);  // a token in two places would be written by two threads
  for (int64_t i = 0; i < tokens; ++i) {
    if (order[i] < 0 || order[i] >= tokens || seen[order[i]]) return "order must be a permutation";
    seen[order[i]] = true;
  }
  for (int64_t i = 0; i < count; ++i) {
    if (segments[i] > segments[i + 1]) return "segments must ascend";
    if (ranks && (ranks[i] < 0 || ranks[i] > rank)) return "ranks must lie in [0, r]";
  }
  return nullptr;
}

// The adapters that have tokens and a rank. lora_A: [L, r, K];  lora_B: [L, N, r], both without gaps
// scaling: [L], or for step 0 one number;  ranks: [L] or null;  order: [T];  segments: [L + 1]
template <class C>
Branch<C> grouped(const Tensor& lora_A, const Tensor& lora_B, const C* scaling, int64_t step, const int64_t* ranks,
                  const int64_t* order, const int64_t* segments) {
  int64_t count = lora_A.size(0), rank = lora_A.size(1), k = lora_A.size(2), n = lora_B.size(1);
  Dtype dtype = dtype_of(lora_A, "lora_A");
  int64_t a_bytes = rank * k * item_size(dtype), b_bytes = n * rank * item_size(dtype);
  auto* a = static_cast<char*>(lora_A.mutable_data_ptr());
  auto* b = static_cast<char*>(lora_B.mutable_data_ptr());
  Branch<C> branch{{}, k, n};
  branch.adapters.reserve(count);
  for (int64_t i = 0; i < count; ++i) {
    int64_t size = segments[i + 1] - segments[i], true_rank = ranks ? ranks[i] : rank;
    if (size == 0 || true_rank == 0) continue;
    branch.adapters.push_back({{dtype, a + i * a_bytes, k},
                               {dtype, b + i * b_bytes, rank},
                               true_rank,
                               scaling[i * step],
                               {order + segments[i], size}});
  }
  return branch;
}

template <class C>
Branch<C> grouped(const Tensor& lora_A, const Tensor& lora_B, const Tensor& scaling, const OptionalTensor& ranks,
                  const Tensor& order, const Tensor& segments, int64_t tokens) {
  int64_t count = lora_A.size(0), rank = lora_A.size(1), k = lora_A.size(2), n = lora_B.size(1);
  check_adapters<C>(dtype_of(lora_A, "lora_A"), dtype_of(lora_B, "lora_B"));
  contiguous(lora_A, {count, rank, k}, "lora_A");
  contiguous(lora_B, {count, n, rank}, "lora_B");
  const C* scales = sums<C>(scaling, {count}, "scaling");
  const int64_t* true_ranks = ranks ? integers(*ranks, count, "ranks") : nullptr;
  const int64_t* position = integers(order, tokens, "order");
  const int64_t* bounds = integers(segments, count + 1, "segments");
  const char* why = fault(position, tokens, bounds, count, true_ranks, rank);
  STD_TORCH_CHECK(!why, why);
  return grouped<C>(lora_A, lora_B, scales, 1, true_ranks, position, bounds);
}

// s[t] = x[t] A^T;  y[t] = x[t] W^T + bias + scaling * s[t] B^T for the tokens t of every adapter, without the last term
// for others; without W, y[t] += the last term.  s: [T, r], out;  y: [T, N], out
template <class C>
void forward(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const Branch<C>& branch,
             int64_t rank, Tensor& y, C* s) {
  int64_t tokens = x.size(0), k = branch.features_in;
  Rows in = rows_of(x, tokens, k, "x");
  bool upcast = weight && upcasts(in.dtype);
  Buffer<float> wide(upcast ? tokens : 0, k);
  if (upcast) convert(in, wide.rows(), tokens, k);
  shrink<C>(branch, upcast ? wide.rows() : in, s, rank);
  if (weight) return adapted_linear<C>(x, wide, *weight, bias, branch, s, rank, y);
  expand<C>(branch, s, rank, rows_of(y, tokens, branch.features_out, "y"), 0, branch.features_out);
}

template <class C>
void multi_lora_forward(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& lora_A,
                        const Tensor& lora_B, const Tensor& scaling, const OptionalTensor& ranks, const Tensor& order,
                        const Tensor& segments, Tensor& y, Tensor& s) {
  int64_t tokens = x.size(0), rank = lora_A.size(1);
  auto branch = grouped<C>(lora_A, lora_B, scaling, ranks, order, segments, tokens);
  forward<C>(x, weight, bias, branch, rank, y, sums<C>(s, {tokens, rank}, "s"));
}

template <class C>
void multi_lora_backward(const Tensor& dy, const OptionalTensor& x, const OptionalTensor& weight, const Tensor& lora_A,
                         const Tensor& lora_B, const Tensor& scaling, const OptionalTensor& ranks, const Tensor& order,
                         const Tensor& segments, const OptionalTensor& s, OptionalTensor& dx, OptionalTensor& dlora_A,
                         OptionalTensor& dlora_B) {
  int64_t tokens = dy.size(0), count = lora_A.size(0), rank = lora_A.size(1);
  auto branch = grouped<C>(lora_A, lora_B, scaling, ranks, order, segments, tokens);
  int64_t k = branch.features_in, n = branch.features_out;
  Dtype dtype = dtype_of(lora_A, "lora_A");
  STD_TORCH_CHECK(!dlora_A || x, "dlora_A needs x");
  STD_TORCH_CHECK(!dlora_B || s, "dlora_B needs s");
  char* da = dlora_A ? contiguous(*dlora_A, {count, rank, k}, "dlora_A") : nullptr;
  char* db = dlora_B ? contiguous(*dlora_B, {count, n, rank}, "dlora_B") : nullptr;
  Rows gradient = rows_of(dy, tokens, n, "dy"), out = rows_of(dx, tokens, k, "dx");
  bool base = dx && weight, upcast = base && upcasts(gradient.dtype);
  if (base) check_weight(*weight, n, k, gradient.dtype);

  // What no task writes is zero: the gradients of idle adapters and unused ranks, and of tokens of no adapter.
  int64_t a_bytes = rank * k * item_size(dtype), b_bytes = n * rank * item_size(dtype);
  std::vector<bool> whole(count, false), reached(tokens, false);
  for (Adapter& adapter : branch.adapters) {
    int64_t i = (adapter.a.data - static_cast<char*>(lora_A.mutable_data_ptr())) / a_bytes;
    if (da) adapter.da = {dtype, da + i * a_bytes, k};
    if (db) adapter.db = {dtype, db + i * b_bytes, rank};
    whole[i] = adapter.rank == rank;
    for (int64_t t = 0; t < adapter.tokens.count; ++t) reached[adapter.tokens[t]] = true;
  }
  for (int64_t i = 0; i < count; ++i) {
    if (da && !whole[i]) std::memset(da + i * a_bytes, 0, a_bytes);
    if (db && !whole[i]) std::memset(db + i * b_bytes, 0, b_bytes);
  }
  for (int64_t t = 0; out && !base && t < tokens; ++t)
    if (!reached[t]) std::memset(out.at(t), 0, k * item_size(out.dtype));

  const C* shrunk = s ? sums<C>(*s, {tokens, rank}, "s") : nullptr;
  Buffer<float> wide(upcast ? tokens : 0, n), sum(upcast ? tokens : 0, k);
  if (upcast) {
    convert(gradient, wide.rows(), tokens, n);
    gradient = wide.rows();
    input_gradient(wide, tokens, *weight, false, sum);
  } else if (base) {
    matmul(dy, *weight, true, std::nullopt, *dx);
  }
  Rows to = upcast ? sum.rows() : out;
  backward<C>(branch, gradient, rows_of(x, tokens, k, "x"), shrunk, rank, base ? to : Rows{}, to);
  if (upcast) convert(to, out, tokens, k);
}

// What an ordinary call gives besides its matrices.
struct Given {
  const Tensor& slots;  // [T], or a routing's order
  const OptionalTensor &segments, &scalings;  // [L + 1];  [L], or none:
  double scaling;
  const OptionalTensor& ranks;  // [L]
};

// Calls run(branch, rank) if these are ordinary operands, else returns false.
// in: x [T, K] as rows;  lora_A: [L, r, K];  lora_B: [L, N, r]
template <class C, class Run>
bool ordinary(const Rows& in, int64_t tokens, int64_t k, int64_t n, const Tensor& lora_A, const Tensor& lora_B,
              const Given& given, Run run) {
  const auto& [slots, segments, scalings, scaling, ranks] = given;
  if (lora_A.dim() != 3 || lora_A.numel() == 0 || !summed_in<C>(in.dtype, lora_A, lora_B)) return false;
  int64_t count = lora_A.size(0), rank = lora_A.size(1);
  if (!shaped(lora_A, {count, rank, k}) || !shaped(lora_B, {count, n, rank})) return false;
  if (!shaped(slots, ScalarType::Long, tokens) || (segments && !shaped(*segments, ScalarType::Long, count + 1)) ||
      (ranks && !shaped(*ranks, ScalarType::Long, count)) ||
      (scalings && !shaped(*scalings, native_scalar<C>, count)) ||
      !std::isfinite(scaling))
    return false;

  const int64_t* order = slots.const_data_ptr<int64_t>();
  const int64_t* bounds = segments ? segments->const_data_ptr<int64_t>() : nullptr;
  std::unique_ptr<int64_t[]> routing;
  if (!segments) {
    if (std::any_of(order, order + tokens, [count](int64_t slot) { return slot < -1 || slot >= count; })) return false;
    routing.reset(new int64_t[tokens + count + 1]);
    group_tokens(order, tokens, count, routing.get(), routing.get() + tokens);
    order = routing.get();
    bounds = order + tokens;
  }
  const int64_t* true_ranks = ranks ? ranks->const_data_ptr<int64_t>() : nullptr;
  if (fault(order, tokens, bounds, count, true_ranks, rank)) return false;

  C scale = C(scaling);
  const C* scales = scalings ? static_cast<const C*>(scalings->const_data_ptr()) : &scale;
  run(grouped<C>(lora_A, lora_B, scales, scalings ? 1 : 0, true_ranks, order, bounds), rank);
  return true;
}

template <class C>
bool multi_lora_call_(const Tensor& y, const Tensor& x, const Tensor& lora_A, const Tensor& lora_B, const Tensor& slots,
                      const OptionalTensor& segments, const OptionalTensor& scalings, double scaling,
                      const OptionalTensor& ranks) {
  if (!on_cpu(y) || !on_cpu(x) || !on_cpu(lora_A) || !on_cpu(lora_B)) return false;
  Rows in = separate_rows(x), out = separate_rows(y);
  if (!in || !out || in.dtype != out.dtype || !same_lead(x, y)) return false;
  int64_t k = x.size(-1), n = y.size(-1), tokens = x.numel() / k;
  for (const Tensor* other : {&x, &lora_A, &lora_B})
    if (!apart(out, tokens, n, *other)) return false;
  Given given{slots, segments, scalings, scaling, ranks};
  return ordinary<C>(in, tokens, k, n, lora_A, lora_B, given, [&](const Branch<C>& branch, int64_t rank) {
    std::unique_ptr<C[]> shrunk(new C[tokens * rank]);
    shrink<C>(branch, in, shrunk.get(), rank);
    expand<C>(branch, shrunk.get(), rank, out, 0, n);
  });
}

// y [..., N], or none.
template <class C>
OptionalTensor multi_lora_call(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& lora_A,
                               const Tensor& lora_B, const Tensor& slots, const OptionalTensor& segments,
                               const OptionalTensor& scalings, double scaling, const OptionalTensor& ranks) {
  if (!on_cpu(x) || !on_cpu(lora_A) || !on_cpu(lora_B)) return {};
  Rows in = separate_rows(x);
  if (!linear(x, in, weight, bias)) return {};
  int64_t n = weight.size(0), k = weight.size(1), tokens = x.numel() / k;
  OptionalTensor y;
  Given given{slots, segments, scalings, scaling, ranks};
  ordinary<C>(in, tokens, k, n, lora_A, lora_B, given, [&](const Branch<C>& branch, int64_t rank) {
    y = empty_rows(x, n);
    Tensor out = as_matrix(*y, tokens, n, n);
    std::unique_ptr<C[]> shrunk(new C[tokens * rank]);
    forward<C>(as_matrix(x, tokens, k, in.stride), weight, bias, branch, rank, out, shrunk.get());
  });
  return y;
}

// y[t] = scale[a] * x[t] + shift[a] for the tokens t of adapter a, x[t] for others; or none.
// x: [..., D];  scale, shift: [L, D];  slots: [T], or a routing's order;  segments: [L + 1];  y: [..., D]
template <class C>
OptionalTensor multi_scale_call(const Tensor& x, const Tensor& scale, const OptionalTensor& shift, const Tensor& slots,
                                const OptionalTensor& segments) {
  if (!on_cpu(x) || !on_cpu(scale) || (shift && !on_cpu(*shift))) return {};
  Rows in = separate_rows(x);
  if (!in || !sums_in<C>(in.dtype) || scale.dim() != 2 || scale.size(0) == 0) return {};
  int64_t n = x.size(-1), tokens = x.numel() / n, count = scale.size(0);
  for (const Tensor* table : {&scale, shift ? &*shift : &scale})
    if (float_dtype(*table) != native<C> || !shaped(*table, {count, n})) return {};
  if (!shaped(slots, ScalarType::Long, tokens) || (segments && !shaped(*segments, ScalarType::Long, count + 1))) return {};

  const int64_t* owners = slots.const_data_ptr<int64_t>();
  std::unique_ptr<int64_t[]> found;
  if (segments) {
    const int64_t *order = owners, *bounds = segments->const_data_ptr<int64_t>();
    if (fault(order, tokens, bounds, count, nullptr, 0)) return {};
    found.reset(new int64_t[tokens]);
    std::fill_n(found.get(), tokens, -1);
    for (int64_t a = 0; a < count; ++a)
      for (int64_t i = bounds[a]; i < bounds[a + 1]; ++i) found[order[i]] = a;
    owners = found.get();
  } else if (std::any_of(owners, owners + tokens, [count](int64_t slot) { return slot < -1 || slot >= count; })) {
    return {};
  }

  Tensor y = empty_rows(x, n);
  Rows out = {in.dtype, static_cast<char*>(y.mutable_data_ptr()), n};
  const C* scales = static_cast<const C*>(scale.const_data_ptr());
  const C* shifts = shift ? static_cast<const C*>(shift->const_data_ptr()) : nullptr;
  const auto& k = kernels<C>();
  torch::stable::parallel_for(0, tokens, 1 + 16384 / n, [&](int64_t begin, int64_t end) {
    bool same = item_size(in.dtype) == sizeof(C);
    std::unique_ptr<C[]> stage(new C[same ? 0 : n]);
    for (int64_t t = begin; t < end; ++t) {
      int64_t a = owners[t];
      if (a < 0) {
        std::memcpy(out.at(t), in.at(t), n * item_size(in.dtype));
        continue;
      }
      C* row = same ? reinterpret_cast<C*>(out.at(t)) : stage.get();
      k.multiply(row_of(in, t, n, stage.get()), scales + a * n, row, n);
      if (shifts) k.add(row, shifts + a * n, n);
      if (!same) k.narrow(out.dtype, row, out.at(t), n);
    }
  });
  return y;
}

void group_tokens_cpu(const Tensor& slots, Tensor& order, Tensor& segments) {
  int64_t tokens = slots.numel(), bounds = segments.numel();
  STD_TORCH_CHECK(bounds >= 1, "segments must be of shape [L + 1]");
  group_tokens(integers(slots, tokens, "slots"), tokens, bounds - 1, integers(order, tokens, "order"),
               integers(segments, bounds, "segments"));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyfastpeft, CPU, m) {
  m.impl("multi_lora_forward", BOX_BY_SUMS(multi_lora_forward));
  m.impl("multi_lora_backward", BOX_BY_SUMS(multi_lora_backward));
  m.impl("group_tokens", TORCH_BOX(&group_tokens_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(pyfastpeft, CompositeExplicitAutograd, m) {
  m.impl("multi_lora_call", BOX_BY_SUMS(multi_lora_call));
  m.impl("multi_lora_call_", BOX_BY_SUMS(multi_lora_call_));
  m.impl("multi_scale_call", BOX_BY_SUMS(multi_scale_call));
}

}  // namespace pyfastpeft
