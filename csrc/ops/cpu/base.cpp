#include "ops/cpu/base.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
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

}  // namespace

Tensor as_matrix(const Tensor& t, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride) {
  int64_t sizes[] = {rows, columns}, strides[] = {row_stride, column_stride};
  AtenTensorHandle view;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), 2, sizes, strides, 0, &view));
  return Tensor(view);
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
  return Tensor(made);
}

void matmul(const Tensor& in, const Tensor& w, bool transposed, const OptionalTensor& bias, Tensor& out) {
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
  if (w.stride(0) != 1 && w.stride(1) != 1 && w.size(0) != 1 && w.size(1) != 1)
    return matmul_upcast(in, m, torch::stable::contiguous(w), transposed, done);
  const auto& k = kernels<float>();
  int64_t q = w.size(transposed ? 1 : 0), p = w.size(transposed ? 0 : 1);
  int64_t stride_q = w.stride(transposed ? 1 : 0), stride_p = w.stride(transposed ? 0 : 1);
  Dtype dtype = dtype_of(w, "weight");
  const char* data = static_cast<const char*>(w.const_data_ptr());
  Tensor whole = view(Matrix<float>{const_cast<float*>(in), m, p, p});
  // Rows of w cast at a time: few rows of `in` want the cast ones in cache, many want them to pay for packing `in`.
  int64_t block = m < 128 ? 32 : 256, count = (q + block - 1) / block;
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    std::unique_ptr<float[]> cast(new float[block * p]), product(new float[m * block]);
    for (int64_t q0 = begin * block; q0 < std::min(end * block, q); q0 += block) {
      int64_t n = std::min(block, q - q0);
      bool along_p = stride_p == 1 || p == 1;  // else along q: a gap-free run of w holds one p and many q
      int64_t runs = along_p ? n : p, length = along_p ? p : n, run = along_p ? stride_q : stride_p;
      const char* first = data + q0 * stride_q * item_size(dtype);
      for (int64_t i = 0; i < runs; ++i)
        k.widen(dtype, first + i * run * item_size(dtype), cast.get() + i * length, length);
      Tensor second = view(along_p ? Matrix<float>{cast.get(), p, n, 1, p} : Matrix<float>{cast.get(), p, n, n});
      Tensor out = view(Matrix<float>{product.get(), m, n, n});
      TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), whole.get(), second.get()));
      done(q0, n, {Dtype::f32, reinterpret_cast<char*>(product.get()), n});
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

}  // namespace pyfastpeft
