// Passes over a matrix that scale its columns, and sum products over its rows.
#pragma once
#include "ops/cuda/elements.h"
#include "ops/cuda/runtime.h"

namespace pyfastpeft {

constexpr int kRunLanes = 32;        // runs of features that a block works on
constexpr int kRowGroups = 8;        // groups of rows among its threads
constexpr int kRowUnroll = 4;        // rows that a thread loads at once
constexpr int kColumnBlocks = 2048;  // blocks that a launch aims at, whatever the device

// out[m, f] = in[m, f] * l[f] + bias[f], without bias but the first term.  in, out: [M, F];  l, bias: [F]
template <class T, bool vector>
__global__ void __launch_bounds__(kRunLanes* kRowGroups, 2)
    scale_kernel(const T* in, int64_t in_stride, AnyFloats l, const T* bias, T* out, int64_t out_stride, int64_t rows,
                 int64_t columns, int64_t part) {
  using R = Run<T, vector>;
  int64_t f = (int64_t(blockIdx.x) * kRunLanes + threadIdx.x) * R::size;
  if (f >= columns) return;
  Wide<T> factor[R::size], shift[R::size];
#pragma unroll
  for (int i = 0; i < R::size; ++i) {
    factor[i] = l.at<Wide<T>>(f + i);
    shift[i] = bias ? static_cast<Wide<T>>(bias[f + i]) : Wide<T>(0);
  }
  int64_t end = min(rows, (blockIdx.y + 1) * part);
  for (int64_t m = blockIdx.y * part + threadIdx.y; m < end; m += kRowGroups * kRowUnroll) {
    R run[kRowUnroll];
#pragma unroll
    for (int u = 0; u < kRowUnroll; ++u)
      if (m + u * kRowGroups < end) run[u] = R::load(in + (m + u * kRowGroups) * in_stride + f);
#pragma unroll
    for (int u = 0; u < kRowUnroll; ++u) {
      if (m + u * kRowGroups >= end) break;
#pragma unroll
      for (int i = 0; i < R::size; ++i) run[u].of[i] = run[u].of[i] * factor[i] + shift[i];
      run[u].store(out + (m + u * kRowGroups) * out_stride + f);
    }
  }
}

// sums[h, f] = sum over the rows m of part h of a[m, f] b[m, f];  out[m, f] = a[m, f] * l[f], unless out is null.
// a, b, out: [M, F];  l: [F];  sums: [parts, F]
template <class T, bool vector>
__global__ void __launch_bounds__(kRunLanes* kRowGroups, 2)
    scale_and_sum_kernel(const T* a, int64_t a_stride, const T* b, int64_t b_stride, AnyFloats l, T* out,
                         int64_t out_stride, Wide<T>* sums, int64_t rows, int64_t columns, int64_t part) {
  using R = Run<T, vector>;
  using C = Wide<T>;
  int64_t f = (int64_t(blockIdx.x) * kRunLanes + threadIdx.x) * R::size;
  bool inside = f < columns;
  C factor[R::size], sum[R::size];
#pragma unroll
  for (int i = 0; i < R::size; ++i) {
    factor[i] = inside && out ? l.at<C>(f + i) : C(0);
    sum[i] = 0;
  }
  int64_t end = inside ? min(rows, (blockIdx.y + 1) * part) : 0;
  for (int64_t m = blockIdx.y * part + threadIdx.y; m < end; m += kRowGroups * kRowUnroll) {
    R left[kRowUnroll], right[kRowUnroll];
#pragma unroll
    for (int u = 0; u < kRowUnroll; ++u) {
      if (m + u * kRowGroups >= end) break;
      left[u] = R::load(a + (m + u * kRowGroups) * a_stride + f);
      right[u] = R::load(b + (m + u * kRowGroups) * b_stride + f);
    }
#pragma unroll
    for (int u = 0; u < kRowUnroll; ++u) {
      if (m + u * kRowGroups >= end) break;
#pragma unroll
      for (int i = 0; i < R::size; ++i) {
        sum[i] += left[u].of[i] * right[u].of[i];
        left[u].of[i] *= factor[i];
      }
      if (out) left[u].store(out + (m + u * kRowGroups) * out_stride + f);
    }
  }
  C* shared = shared_memory<C>();  // [kRowGroups, R::size, kRunLanes]
#pragma unroll
  for (int i = 0; i < R::size; ++i) shared[(threadIdx.y * R::size + i) * kRunLanes + threadIdx.x] = sum[i];
  __syncthreads();
  // A row of threads finishes its share of the block's columns, the groups in their order.
  for (int i = threadIdx.y; i < R::size && inside; i += kRowGroups) {
    C total = 0;
    for (int group = 0; group < kRowGroups; ++group) total += shared[(group * R::size + i) * kRunLanes + threadIdx.x];
    sums[blockIdx.y * columns + f + i] = total;
  }
}

// total[f] = sum over h of sums[h, f], in the order of h.  sums: [parts, F];  total: [F]
template <class C>
__global__ void __launch_bounds__(kRunLanes* kRowGroups)
    add_parts_kernel(const C* sums, AnyFloats total, int64_t parts, int64_t columns) {
  int64_t f = int64_t(blockIdx.x) * kRunLanes + threadIdx.x;
  C sum = 0;
  for (int64_t h = threadIdx.y; h < parts && f < columns; h += kRowGroups) sum += sums[h * columns + f];
  C* shared = shared_memory<C>();  // [kRowGroups, kRunLanes]
  shared[threadIdx.y * kRunLanes + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y || f >= columns) return;
  sum = 0;
  for (int group = 0; group < kRowGroups; ++group) sum += shared[group * kRunLanes + threadIdx.x];
  total.put(f, sum);
}

// Columns in blocks, rows in parts: how a matrix is dealt out depends on its shape alone.
struct Deal {
  int64_t blocks, parts, part;

  Deal(int64_t rows, int64_t columns, int64_t run) : blocks((columns + kRunLanes * run - 1) / (kRunLanes * run)) {
    int64_t least = kRowGroups * kRowUnroll, wanted = std::max<int64_t>(1, kColumnBlocks / blocks);
    part = std::max((rows + wanted - 1) / wanted, least);
    part = (part + least - 1) / least * least;
    parts = (rows + part - 1) / part;
  }
  dim3 grid() const { return {unsigned(blocks), unsigned(parts)}; }
};

inline AnyFloats floats(const Tensor& t, std::initializer_list<int64_t> shape, const char* name) {
  return {contiguous(t, shape, name), dtype_of(t, name)};
}

// wide[i] = in[i].  in, wide: [size]
inline __global__ void __launch_bounds__(256) widen_kernel(AnyFloats in, float* wide, int64_t size) {
  int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < size) wide[i] = in.at<float>(i);
}

// t without gaps in float32: itself or a copy.
inline Tensor widened(const Tensor& t, std::initializer_list<int64_t> shape, const char* name, cudaStream_t stream) {
  AnyFloats in = floats(t, shape, name);
  if (in.dtype == Dtype::f32) return t;
  Tensor result = scratch(t, shape, ScalarType::Float);
  launch(widen_kernel, dim3((t.numel() + 255) / 256), dim3(256), 0, stream, in,
         static_cast<float*>(result.mutable_data_ptr()), t.numel());
  return result;
}

// out = in * l + bias, or without bias in * l.  in, out: [rows, columns];  l: [columns];  bias: the same, of in's dtype
inline void scale(const Rows& in, AnyFloats l, const void* bias, const Rows& out, int64_t rows, int64_t columns,
                  cudaStream_t stream) {
  with_type(in.dtype, [&]<class T>(T) {
    auto run = [&]<bool vector>(std::bool_constant<vector>) {
      Deal deal(rows, columns, Run<T, vector>::size);
      launch(scale_kernel<T, vector>, deal.grid(), dim3(kRunLanes, kRowGroups), 0, stream,
             reinterpret_cast<const T*>(in.data), in.stride, l, static_cast<const T*>(bias), reinterpret_cast<T*>(out.data),
             out.stride, rows, columns, deal.part);
    };
    in_runs(in, columns) && in_runs(out, columns) ? run(std::true_type{}) : run(std::false_type{});
  });
}

// total = sum over rows of a * b;  out = a * l, unless there is no out.  a, b, out: [rows, columns];  l, total: [columns]
inline void scale_and_sum(const Tensor& like, const Rows& a, const Rows& b, AnyFloats l, const Rows& out, AnyFloats total,
                   int64_t rows, int64_t columns, cudaStream_t stream) {
  with_type(a.dtype, [&]<class T>(T) {
    using C = Wide<T>;
    auto run = [&]<bool vector>(std::bool_constant<vector>) {
      constexpr int size = Run<T, vector>::size;
      Deal deal(rows, columns, size);
      Tensor sums = scratch(like, {deal.parts, columns}, sizeof(C) == 8 ? ScalarType::Double : ScalarType::Float);
      auto* planes = static_cast<C*>(sums.mutable_data_ptr());
      launch(scale_and_sum_kernel<T, vector>, deal.grid(), dim3(kRunLanes, kRowGroups), kRowGroups * size * kRunLanes * sizeof(C),
             stream, reinterpret_cast<const T*>(a.data), a.stride, reinterpret_cast<const T*>(b.data), b.stride, l,
             reinterpret_cast<T*>(out.data), out.stride, planes, rows, columns, deal.part);
      launch(add_parts_kernel<C>, dim3((columns + kRunLanes - 1) / kRunLanes), dim3(kRunLanes, kRowGroups),
             kRowGroups * kRunLanes * sizeof(C), stream, planes, total, deal.parts, columns);
    };
    in_runs(a, columns) && in_runs(b, columns) && in_runs(out, columns) ? run(std::true_type{})
                                                                        : run(std::false_type{});
  });
}

}  // namespace pyfastpeft
