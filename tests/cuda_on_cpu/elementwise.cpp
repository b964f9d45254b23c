// Binds the elementwise kernels of csrc/cuda, compiled for the CPU, with their argument structs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "stages.h"

namespace py = pybind11;
using namespace gpl_fast;

namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return (T*)address;
}

Strides strides(const std::array<int64_t, 4>& s) { return {s[0], s[1], s[2], s[3]}; }

void relu_bwd(int64_t pixels, int64_t C, int dtype, Address dy, Address mask, Address dz) {
  cuda::relu_bwd({pixels, C, (DType)dtype, at<void>(dy), at<uint8_t>(mask), at<void>(dz)}, nullptr);
}

void relu_pool_bwd(std::array<int64_t, 4> shape, int64_t row0, int64_t rows, int pool, int dtype,
                   Address dy, Address code, Address dz, std::array<int64_t, 3> image_strides) {
  ReluPoolBwd a = {};
  a.N = shape[0], a.H = shape[1], a.W = shape[2], a.C = shape[3];
  a.strip = {row0, rows};
  a.pool = (Pool)pool, a.dtype = (DType)dtype;
  a.dy = at<void>(dy), a.code = at<uint8_t>(code), a.dz = at<void>(dz);
  a.dy_image_stride = image_strides[0], a.code_image_stride = image_strides[1];
  a.dz_image_stride = image_strides[2];
  cuda::relu_pool_bwd(a, nullptr);
}

void softmax_bwd(std::array<int64_t, 4> shape, Address x, std::array<int64_t, 4> x_strides,
                 int x_dtype, Address lse, Address dy, int64_t c_pad, int dy_dtype, Address scale,
                 Address valid, int activation, double temperature, Address labels, Address ce_lse,
                 Address ce_scale, Address class_weight, float label_smoothing, int64_t row0,
                 int64_t rows, Address dx, std::array<int64_t, 4> dx_strides) {
  SoftmaxBwd a = {};
  a.N = shape[0], a.C = shape[1], a.H = shape[2], a.W = shape[3], a.c_pad = c_pad;
  a.strip = {row0, rows};
  a.activation = (Activation)activation, a.inv_t = inverse_of(temperature);
  a.x_dtype = (DType)x_dtype, a.dtype = (DType)dy_dtype;
  a.x = at<void>(x), a.x_strides = strides(x_strides);
  a.lse = at<float>(lse), a.scale = at<float>(scale), a.valid = at<uint8_t>(valid);
  a.dy = at<void>(dy), a.dy_image_stride = rows * a.W * c_pad;
  const bool shared = a.activation == Activation::kSoftmax && temperature == 1.0;
  a.ce = {at<int64_t>(labels), at<float>(class_weight), label_smoothing, !shared};
  a.ce_lse = shared ? a.lse : at<float>(ce_lse), a.ce_scale = at<float>(ce_scale);
  a.dx = at<void>(dx), a.dx_strides = strides(dx_strides);
  cuda::softmax_bwd(a, nullptr);
}

}  // namespace

PYBIND11_MODULE(elementwise, m) {
  m.def("relu_bwd", &relu_bwd);
  m.def("relu_pool_bwd", &relu_pool_bwd);
  m.def("softmax_bwd", &softmax_bwd);
}
