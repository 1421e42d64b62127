#include <torch/csrc/stable/library.h>

#include "ops/cuda/base.h"
#include "ops/cuda/elements.h"
#include "ops/cuda/runtime.h"

namespace pyfastpeft {

namespace {

constexpr int kLanes = 32;   // runs of features that a block works on
constexpr int kGroups = 8;   // groups of rows among its threads
constexpr int kUnroll = 4;   // rows that a thread loads at once
constexpr int kBlocks = 2048;  // that a launch aims at, whatever the device

// out[m, f] = in[m, f] * l[f].  in, out: [M, F];  l: [F]
template <class T, bool vector>
__global__ void __launch_bounds__(kLanes* kGroups, 2)
    scale_kernel(const T* in, int64_t in_stride, AnyFloats l, T* out, int64_t out_stride, int64_t rows,
                 int64_t columns, int64_t part) {
  using R = Run<T, vector>;
  int64_t f = (int64_t(blockIdx.x) * kLanes + threadIdx.x) * R::size;
  if (f >= columns) return;
  Wide<T> factor[R::size];
#pragma unroll
  for (int i = 0; i < R::size; ++i) factor[i] = l.at<Wide<T>>(f + i);
  int64_t end = min(rows, (blockIdx.y + 1) * part);
  for (int64_t m = blockIdx.y * part + threadIdx.y; m < end; m += kGroups * kUnroll) {
    R run[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (m + u * kGroups < end) run[u] = R::load(in + (m + u * kGroups) * in_stride + f);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (m + u * kGroups >= end) break;
#pragma unroll
      for (int i = 0; i < R::size; ++i) run[u].of[i] *= factor[i];
      run[u].store(out + (m + u * kGroups) * out_stride + f);
    }
  }
}

// sums[h, f] = sum over the rows m of part h of a[m, f] b[m, f];  out[m, f] = a[m, f] * l[f], unless out is null.
// a, b, out: [M, F];  l: [F];  sums: [parts, F]
template <class T, bool vector>
__global__ void __launch_bounds__(kLanes* kGroups, 2)
    scale_and_sum_kernel(const T* a, int64_t a_stride, const T* b, int64_t b_stride, AnyFloats l, T* out,
                         int64_t out_stride, Wide<T>* sums, int64_t rows, int64_t columns, int64_t part) {
  using R = Run<T, vector>;
  using C = Wide<T>;
  int64_t f = (int64_t(blockIdx.x) * kLanes + threadIdx.x) * R::size;
  bool inside = f < columns;
  C factor[R::size], sum[R::size];
#pragma unroll
  for (int i = 0; i < R::size; ++i) {
    factor[i] = inside && out ? l.at<C>(f + i) : C(0);
    sum[i] = 0;
  }
  int64_t end = inside ? min(rows, (blockIdx.y + 1) * part) : 0;
  for (int64_t m = blockIdx.y * part + threadIdx.y; m < end; m += kGroups * kUnroll) {
    R left[kUnroll], right[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (m + u * kGroups >= end) break;
      left[u] = R::load(a + (m + u * kGroups) * a_stride + f);
      right[u] = R::load(b + (m + u * kGroups) * b_stride + f);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (m + u * kGroups >= end) break;
#pragma unroll
      for (int i = 0; i < R::size; ++i) {
        sum[i] += left[u].of[i] * right[u].of[i];
        left[u].of[i] *= factor[i];
      }
      if (out) left[u].store(out + (m + u * kGroups) * out_stride + f);
    }
  }
  C* shared = shared_memory<C>();  // [kGroups, R::size, kLanes]
#pragma unroll
  for (int i = 0; i < R::size; ++i) shared[(threadIdx.y * R::size + i) * kLanes + threadIdx.x] = sum[i];
  __syncthreads();
  // A row of threads finishes its share of the block's columns, the groups in their order.
  for (int i = threadIdx.y; i < R::size && inside; i += kGroups) {
    C total = 0;
    for (int group = 0; group < kGroups; ++group) total += shared[(group * R::size + i) * kLanes + threadIdx.x];
    sums[blockIdx.y * columns + f + i] = total;
  }
}

// total[f] = sum over h of sums[h, f], in the order of h.  sums: [parts, F];  total: [F]
template <class C>
__global__ void __launch_bounds__(kLanes* kGroups)
    add_parts_kernel(const C* sums, AnyFloats total, int64_t parts, int64_t columns) {
  int64_t f = int64_t(blockIdx.x) * kLanes + threadIdx.x;
  C sum = 0;
  for (int64_t h = threadIdx.y; h < parts && f < columns; h += kGroups) sum += sums[h * columns + f];
  C* shared = shared_memory<C>();  // [kGroups, kLanes]
  shared[threadIdx.y * kLanes + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y || f >= columns) return;
  sum = 0;
  for (int group = 0; group < kGroups; ++group) sum += shared[group * kLanes + threadIdx.x];
  total.put(f, sum);
}

// Columns in blocks, rows in parts: how a matrix is dealt out depends on its shape alone.
struct Deal {
  int64_t blocks, parts, part;

  Deal(int64_t rows, int64_t columns, int64_t run) : blocks((columns + kLanes * run - 1) / (kLanes * run)) {
    int64_t least = kGroups * kUnroll, wanted = std::max<int64_t>(1, kBlocks / blocks);
    part = std::max((rows + wanted - 1) / wanted, least);
    part = (part + least - 1) / least * least;
    parts = (rows + part - 1) / part;
  }
  dim3 grid() const { return {unsigned(blocks), unsigned(parts)}; }
};

AnyFloats floats(const Tensor& t, int64_t size, const char* name) {
  return {contiguous(t, {size}, name), dtype_of(t, name)};
}

void scale(const Rows& in, AnyFloats l, const Rows& out, int64_t rows, int64_t columns, cudaStream_t stream) {
  with_type(in.dtype, [&]<class T>(T) {
    auto run = [&]<bool vector>(std::bool_constant<vector>) {
      Deal deal(rows, columns, Run<T, vector>::size);
      launch(scale_kernel<T, vector>, deal.grid(), dim3(kLanes, kGroups), 0, stream,
             reinterpret_cast<const T*>(in.data), in.stride, l, reinterpret_cast<T*>(out.data), out.stride, rows,
             columns, deal.part);
    };
    in_runs(in, columns) && in_runs(out, columns) ? run(std::true_type{}) : run(std::false_type{});
  });
}

// total = sum over rows of a * b;  out = a * l, unless there is no out.
void scale_and_sum(const Tensor& like, const Rows& a, const Rows& b, AnyFloats l, const Rows& out, AnyFloats total,
                   int64_t rows, int64_t columns, cudaStream_t stream) {
  with_type(a.dtype, [&]<class T>(T) {
    using C = Wide<T>;
    auto run = [&]<bool vector>(std::bool_constant<vector>) {
      constexpr int size = Run<T, vector>::size;
      Deal deal(rows, columns, size);
      Tensor sums = scratch(like, {deal.parts, columns}, sizeof(C) == 8 ? ScalarType::Double : ScalarType::Float);
      auto* planes = static_cast<C*>(sums.mutable_data_ptr());
      launch(scale_and_sum_kernel<T, vector>, deal.grid(), dim3(kLanes, kGroups), kGroups * size * kLanes * sizeof(C),
             stream, reinterpret_cast<const T*>(a.data), a.stride, reinterpret_cast<const T*>(b.data), b.stride, l,
             reinterpret_cast<T*>(out.data), out.stride, planes, rows, columns, deal.part);
      launch(add_parts_kernel<C>, dim3((columns + kLanes - 1) / kLanes), dim3(kLanes, kGroups),
             kGroups * kLanes * sizeof(C), stream, planes, total, deal.parts, columns);
    };
    in_runs(a, columns) && in_runs(b, columns) && in_runs(out, columns) ? run(std::true_type{})
                                                                        : run(std::false_type{});
  });
}

// wide = l.  l, wide: [N]
__global__ void __launch_bounds__(kLanes* kGroups) widen_kernel(AnyFloats l, float* wide, int64_t columns) {
  int64_t n = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (n < columns) wide[n] = l.at<float>(n);
}

// y = (x weight^T + bias) * l in the product's epilogue, y rounded once; false where the product is not to be had.
bool forward_by_gemm(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, AnyFloats l, const Rows& in,
                     const Rows& out, int64_t m, int64_t n, int64_t k, cudaStream_t stream) {
  if (item_size(in.dtype) != 2 || weight.stride(1) != 1 || k % 8 || n % 8) return false;
  if (bias && dtype_of(*bias, "bias") != in.dtype) return false;
  Rows w = rows_of(weight, n, k, "weight");
  if (in.stride == 0) return false;  // no tensor map describes rows that are one and the same
  if (!in_runs(in, k) || !in_runs(w, k) || !in_runs(out, n) || !gemm_pays(m, n)) return false;
  OptionalTensor wide;
  auto* scale = static_cast<const float*>(l.data);
  if (l.dtype != Dtype::f32) {
    wide = scratch(x, {n}, ScalarType::Float);
    scale = static_cast<const float*>(wide->const_data_ptr());
    launch(widen_kernel, dim3((n + 255) / 256), dim3(kLanes * kGroups), 0, stream, l,
           static_cast<float*>(wide->mutable_data_ptr()), n);
  }
  multiply({.bfloat16 = in.dtype == Dtype::bf16,
            .rows = m,
            .columns = n,
            .depth = k,
            .left = in.data,
            .right = w.data,
            .left_stride = in.stride,
            .right_stride = w.stride,
            .scale = scale,
            .bias = bias ? contiguous(*bias, {n}, "bias") : nullptr,
            .out = out.data,
            .out_stride = out.stride},
           stream);
  return true;
}

void ia3_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& ia3_l,
                 bool feedforward, Tensor& y, OptionalTensor base) {
  OnDevice device(x);
  int64_t m = x.size(0), n = weight.size(0), k = weight.size(1);
  Rows in = rows_of(x, m, k, "x"), out = rows_of(y, m, n, "y"), product = rows_of(base, m, n, "base");
  check_weight(weight, n, k, in.dtype);
  AnyFloats l = floats(ia3_l, feedforward ? k : n, "ia3_l");
  if (feedforward) {
    Tensor scaled = scratch(x, {m, k}, x.scalar_type());
    scale(in, l, rows_of(scaled, m, k, "x"), m, k, device.stream());
    base_forward(scaled, weight, bias, y);
    return;
  }
  if (!base && forward_by_gemm(x, weight, bias, l, in, out, m, n, k, device.stream())) return;
  Tensor unscaled = base ? *base : y;
  base_forward(x, weight, bias, unscaled);
  scale(base ? product : out, l, out, m, n, device.stream());
}

void ia3_backward(const Tensor& dy, const OptionalTensor& x, const Tensor& weight, const Tensor& ia3_l,
                  bool feedforward, const OptionalTensor& base, OptionalTensor dx, OptionalTensor dia3_l) {
  OnDevice device(dy);
  int64_t m = dy.size(0), n = weight.size(0), k = weight.size(1), features = feedforward ? k : n;
  STD_TORCH_CHECK(!dia3_l || (feedforward ? x : base), "dia3_l needs ", feedforward ? "x" : "base");
  Rows gradient = rows_of(dy, m, n, "dy"), in = rows_of(x, m, k, "x"), product = rows_of(base, m, n, "base");
  Rows out = rows_of(dx, m, k, "dx");
  check_weight(weight, n, k, gradient.dtype);
  AnyFloats l = floats(ia3_l, features, "ia3_l"), dl{};
  if (dia3_l) dl = floats(*dia3_l, features, "dia3_l");
  // Both scale the first and, where the scale trains, sum its products with the second on the way.
  auto scale_to = [&](const Rows& first, const Rows& second, const Rows& scaled) {
    if (dia3_l) {
      scale_and_sum(dy, first, second, l, scaled, dl, m, features, device.stream());
    } else if (scaled) {
      scale(first, l, scaled, m, features, device.stream());
    }
  };
  if (feedforward) {
    Tensor inner = scratch(dy, {m, k}, dy.scalar_type());
    base_backward(dy, weight, inner);
    scale_to(rows_of(inner, m, k, "dy"), in, out);
  } else if (dx) {
    Tensor scaled = scratch(dy, {m, n}, dy.scalar_type());
    scale_to(gradient, product, rows_of(scaled, m, n, "dy"));
    base_backward(scaled, weight, *dx);
  } else {
    scale_to(gradient, product, Rows{});
  }
}

}  // namespace

}  // namespace pyfastpeft

STABLE_TORCH_LIBRARY_IMPL(pyfastpeft, CUDA, m) {
  m.impl("ia3_forward", TORCH_BOX(&pyfastpeft::ia3_forward));
  m.impl("ia3_backward", TORCH_BOX(&pyfastpeft::ia3_backward));
}
