#include <torch/csrc/stable/library.h>

#include <cstring>

#include "group_tokens.h"
#include "ops/cpu/lowrank.h"

namespace pyfastpeft {

namespace {

// The adapters that have tokens and a rank.
template <class C>
Branch<C> grouped(const Tensor& lora_A, const Tensor& lora_B, const Tensor& scaling, const OptionalTensor& ranks,
                  const Tensor& order, const Tensor& segments, int64_t tokens) {
  int64_t count = lora_A.size(0), rank = lora_A.size(1), k = lora_A.size(2), n = lora_B.size(1);
  Dtype dtype = dtype_of(lora_A, "lora_A");
  check_adapters<C>(dtype, dtype_of(lora_B, "lora_B"));
  char* a = contiguous(lora_A, {count, rank, k}, "lora_A");
  char* b = contiguous(lora_B, {count, n, rank}, "lora_B");
  const C* scales = sums<C>(scaling, {count}, "scaling");
  const int64_t* true_ranks = ranks ? integers(*ranks, count, "ranks") : nullptr;
  const int64_t* position = integers(order, tokens, "order");
  const int64_t* bounds = integers(segments, count + 1, "segments");
  STD_TORCH_CHECK(bounds[0] >= 0 && bounds[count] <= tokens, "segments must lie in order");
  std::vector<bool> seen(tokens, false);  // a token in two places would be written by two threads
  for (int64_t i = 0; i < tokens; ++i) {
    STD_TORCH_CHECK(0 <= position[i] && position[i] < tokens && !seen[position[i]], "order must be a permutation");
    seen[position[i]] = true;
  }

  Branch<C> branch{{}, k, n};
  for (int64_t i = 0; i < count; ++i) {
    int64_t size = bounds[i + 1] - bounds[i], true_rank = true_ranks ? true_ranks[i] : rank;
    STD_TORCH_CHECK(size >= 0 && 0 <= true_rank && true_rank <= rank, "segments must ascend, ranks lie in [0, r]");
    if (size == 0 || true_rank == 0) continue;
    branch.adapters.push_back({{dtype, a + i * rank * k * item_size(dtype), k},
                               {dtype, b + i * n * rank * item_size(dtype), rank},
                               true_rank,
                               scales[i],
                               {position + bounds[i], size}});
  }
  return branch;
}

template <class C>
void forward(const Tensor& x, const Tensor& lora_A, const Tensor& lora_B, const Tensor& scaling,
             const OptionalTensor& ranks, const Tensor& order, const Tensor& segments, Tensor& y, Tensor& s) {
  int64_t tokens = x.size(0);
  auto branch = grouped<C>(lora_A, lora_B, scaling, ranks, order, segments, tokens);
  C* shrunk = sums<C>(s, {tokens, lora_A.size(1)}, "s");
  shrink<C>(branch, rows_of(x, tokens, branch.features_in, "x"), shrunk, lora_A.size(1));
  expand<C>(branch, shrunk, lora_A.size(1), rows_of(y, tokens, branch.features_out, "y"), 0, branch.features_out);
}

template <class C>
void backward(const Tensor& dy, const OptionalTensor& x, const Tensor& lora_A, const Tensor& lora_B,
              const Tensor& scaling, const OptionalTensor& ranks, const Tensor& order, const Tensor& segments,
              const OptionalTensor& s, OptionalTensor& dx, OptionalTensor& dlora_A, OptionalTensor& dlora_B) {
  int64_t tokens = dy.size(0), count = lora_A.size(0), rank = lora_A.size(1);
  auto branch = grouped<C>(lora_A, lora_B, scaling, ranks, order, segments, tokens);
  int64_t k = branch.features_in, n = branch.features_out;
  Dtype dtype = dtype_of(lora_A, "lora_A");
  STD_TORCH_CHECK(!dlora_A || x, "dlora_A needs x");
  STD_TORCH_CHECK(!dlora_B || s, "dlora_B needs s");
  char* da = dlora_A ? contiguous(*dlora_A, {count, rank, k}, "dlora_A") : nullptr;
  char* db = dlora_B ? contiguous(*dlora_B, {count, n, rank}, "dlora_B") : nullptr;
  Rows out = rows_of(dx, tokens, k, "dx");

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
  for (int64_t t = 0; out && t < tokens; ++t)
    if (!reached[t]) std::memset(out.at(t), 0, k * item_size(out.dtype));

  const C* shrunk = s ? sums<C>(*s, {tokens, rank}, "s") : nullptr;
  backward<C>(branch, rows_of(dy, tokens, n, "dy"), rows_of(x, tokens, k, "x"), shrunk, rank, Rows{}, out);
}

void multi_lora_forward(const Tensor& x, const Tensor& lora_A, const Tensor& lora_B, const Tensor& scaling,
                        const OptionalTensor& ranks, const Tensor& order, const Tensor& segments, Tensor& y,
                        Tensor& s) {
  auto run = x.scalar_type() == ScalarType::Double ? forward<double> : forward<float>;
  run(x, lora_A, lora_B, scaling, ranks, order, segments, y, s);
}

void multi_lora_backward(const Tensor& dy, const OptionalTensor& x, const Tensor& lora_A, const Tensor& lora_B,
                         const Tensor& scaling, const OptionalTensor& ranks, const Tensor& order,
                         const Tensor& segments, const OptionalTensor& s, OptionalTensor dx, OptionalTensor dlora_A,
                         OptionalTensor dlora_B) {
  auto run = dy.scalar_type() == ScalarType::Double ? backward<double> : backward<float>;
  run(dy, x, lora_A, lora_B, scaling, ranks, order, segments, s, dx, dlora_A, dlora_B);
}

void group_tokens_cpu(const Tensor& slots, Tensor& order, Tensor& segments) {
  int64_t tokens = slots.numel(), bounds = segments.numel();
  STD_TORCH_CHECK(bounds >= 1, "segments must be of shape [L + 1]");
  group_tokens(integers(slots, tokens, "slots"), tokens, bounds - 1, integers(order, tokens, "order"),
               integers(segments, bounds, "segments"));
}

std::string cpu_capability_string() { return cpu_capability(); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyfastpeft, CPU, m) {
  m.impl("multi_lora_forward", TORCH_BOX(&multi_lora_forward));
  m.impl("multi_lora_backward", TORCH_BOX(&multi_lora_backward));
  m.impl("group_tokens", TORCH_BOX(&group_tokens_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(pyfastpeft, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability_string));
}

}  // namespace pyfastpeft
