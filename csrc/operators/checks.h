// What every operator checks: shapes, dtypes, layouts, devices, each with what was got and
// expected.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <iterator>
#include <optional>
#include <string>

#include "../arguments.h"

namespace gpl_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Shape = std::initializer_list<int64_t>;

template <class Sizes>
std::string text(const Sizes& sizes) {
  std::string s = "[";
  for (int64_t size : sizes) s += (s.size() > 1 ? ", " : "") + std::to_string(size);
  return s + "]";
}

inline DType float_dtype(const Tensor& t, const char* name) {
  ScalarType s = t.scalar_type();
  STD_TORCH_CHECK(s == ScalarType::Float || s == ScalarType::BFloat16 || s == ScalarType::Half,
                  "gpl_fast: ", name, " must be float32, bfloat16 or float16, got ",
                  torch::headeronly::toString(s));
  return s == ScalarType::Float      ? DType::kFloat32
         : s == ScalarType::BFloat16 ? DType::kBFloat16
                                     : DType::kFloat16;
}

// What float32 arithmetic on maps of another dtype put out need not be rounded to that.
inline DType same_or_float32(const Tensor& t, const char* name, const Tensor& other,
                             const char* other_name) {
  const ScalarType s = t.scalar_type();
  STD_TORCH_CHECK(s == other.scalar_type() || s == ScalarType::Float, "gpl_fast: ", name,
                  " must have the dtype of ", other_name, ", ",
                  torch::headeronly::toString(other.scalar_type()), ", or float32, got ",
                  torch::headeronly::toString(s));
  return float_dtype(t, name);
}

inline void check_shape(const Tensor& t, const char* name, Shape shape) {
  bool same = t.dim() == (int64_t)shape.size();
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == shape.begin()[i];
  STD_TORCH_CHECK(same, "gpl_fast: ", name, " must have the shape ", text(shape), ", got ",
                  text(t.sizes()));
}

inline void check_dtype(const Tensor& t, const char* name, ScalarType dtype) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, "gpl_fast: ", name, " must be ",
                  torch::headeronly::toString(dtype), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
}

inline void* contiguous(const Tensor& t, const char* name, ScalarType dtype, Shape shape) {
  check_shape(t, name, shape);
  check_dtype(t, name, dtype);
  STD_TORCH_CHECK(t.is_contiguous(), "gpl_fast: ", name, " must be contiguous");
  return t.data_ptr();
}

template <class T>
T* contiguous(const MaybeTensor& t, const char* name, ScalarType dtype, Shape shape) {
  return t ? (T*)contiguous(*t, name, dtype, shape) : nullptr;
}

// Images contiguous in themselves, at any stride: a slice of rows of one image passes.
inline int64_t image_stride(const Tensor& t, const char* name, ScalarType dtype, Shape shape) {
  check_shape(t, name, shape);
  check_dtype(t, name, dtype);
  int64_t dense = 1;
  bool ok = true;
  for (int64_t i = t.dim() - 1; i > 0; --i) {
    ok = ok && (t.size(i) == 1 || t.stride(i) == dense);
    dense *= t.size(i);
  }
  STD_TORCH_CHECK(ok || t.numel() == 0, "gpl_fast: ", name,
                  " must be contiguous within an image, strides ", text(t.strides()));
  return t.stride(0);
}

inline int64_t image_stride(const MaybeTensor& t, const char* name, ScalarType dtype, Shape shape) {
  return t ? image_stride(*t, name, dtype, shape) : 0;
}

// Of the winners of a pool, two to a byte, or of a ReLU's mask, eight to a byte; H, W: of what the
// convolution put out.
inline int64_t code_image_stride(const MaybeTensor& code, Pool pool, int64_t N, int64_t H,
                                 int64_t W, int64_t C) {
  return pool == Pool::kMax
             ? image_stride(code, "code", ScalarType::Byte, {N, H / 2, W / 2, ceil_div(C, 2)})
             : image_stride(code, "code (a mask)", ScalarType::Byte, {N, H, W, ceil_div(C, 8)});
}

// [N, k, H, W] with each [H, W] contiguous: a slice of rows passes.
inline void* planes(const Tensor& t, const char* name, ScalarType dtype, Shape shape) {
  check_shape(t, name, shape);
  check_dtype(t, name, dtype);
  STD_TORCH_CHECK(
      t.numel() == 0 ||
          ((t.size(3) == 1 || t.stride(3) == 1) && (t.size(2) == 1 || t.stride(2) == t.size(3))),
      "gpl_fast: ", name, " must be contiguous within a plane, strides ", text(t.strides()));
  return t.data_ptr();
}

inline void* data(const MaybeTensor& t) { return t ? t->data_ptr() : nullptr; }

inline Strides strides(const Tensor& t) {
  return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

inline Activation activation_of(int64_t value, const char* name) {
  constexpr int64_t count = std::size(kActivationNames);
  if (value >= 0 && value < count) return (Activation)value;
  std::string known;
  for (int64_t i = 0; i < count; ++i) {
    known += std::to_string(i) + " (" + kActivationNames[i] + "), ";
  }
  STD_TORCH_CHECK(false, "gpl_fast: ", name, " must be ", known, "got ", value);
}

inline Pool pool_of(int64_t value) {
  STD_TORCH_CHECK(value == 0 || value == 1, "gpl_fast: pool must be 0 (max) or 1 (avg), got ",
                  value);
  return (Pool)value;
}

inline Criterion criterion_of(int64_t value) {
  STD_TORCH_CHECK(value == 0 || value == 1, "gpl_fast: criterion must be 0 (l2) or 1 (l1), got ",
                  value);
  return (Criterion)value;
}

inline void check_temperature(double temperature) {
  STD_TORCH_CHECK(temperature > 0, "gpl_fast: temperature must be positive, got ", temperature);
}

inline const uint8_t* from_target_of(const MaybeTensor& t, int64_t N) {
  return contiguous<uint8_t>(t, "from_target", ScalarType::Bool, {N});
}

inline Valid valid_of(const MaybeTensor& t, Shape shape) {
  if (t && t->scalar_type() == ScalarType::Float) {
    return {nullptr, contiguous<float>(t, "valid", ScalarType::Float, shape)};
  }
  return {contiguous<uint8_t>(t, "valid", ScalarType::Bool, shape), nullptr};
}

inline CrossEntropy cross_entropy(const MaybeTensor& labels, const MaybeTensor& mask,
                                  const MaybeTensor& class_weight, double label_smoothing,
                                  bool own_lse, int64_t N, int64_t C, int64_t H, int64_t W) {
  CrossEntropy ce = {};
  ce.labels = contiguous<int64_t>(labels, "ce_labels", ScalarType::Long, {N, H, W});
  ce.mask = contiguous<float>(mask, "ce_mask", ScalarType::Float, {N, H, W});
  ce.class_weight = contiguous<float>(class_weight, "class_weight", ScalarType::Float, {C});
  ce.label_smoothing = (float)label_smoothing;
  ce.own_lse = own_lse;
  return ce;
}

struct NamedTensor {
  NamedTensor(const char* name, const Tensor& t) : name(name), t(&t) {}
  NamedTensor(const char* name, const MaybeTensor& t) : name(name), t(t ? &*t : nullptr) {}
  const char* name;
  const Tensor* t;
};

// The dispatcher lets a CPU tensor through beside one on a GPU.
inline void check_device(const Tensor& t, const char* name,
                         std::initializer_list<NamedTensor> others) {
  auto device = [](const Tensor& t) {
    return t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : std::string("cpu");
  };
  for (const NamedTensor& other : others) {
    STD_TORCH_CHECK(!other.t || device(*other.t) == device(t), "gpl_fast: ", other.name,
                    " must be on the device of ", name, ", ", device(t), ", got ",
                    device(*other.t));
  }
}

}  // namespace gpl_fast
