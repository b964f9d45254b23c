// Logits (N, C, H, W) and a target of any kind -> the first maps, NHWC, and the cross-entropy.
#include <algorithm>

#include "dispatch.h"

namespace gpl_fast {

STABLE_TORCH_LIBRARY_FRAGMENT(gpl_fast, m) {
  m.def(
      "softmax_pack_fwd(Tensor x, int activation, int target_activation, float temperature, "
      "int row0, int rows, int core0, int core_rows, float label_smoothing=0.0, "
      "Tensor? valid=None, Tensor? target=None, Tensor? elements=None, Tensor? from_target=None, "
      "Tensor? labels=None, "
      "Tensor? topk_values=None, Tensor? topk_indices=None, Tensor? topk_rest=None, "
      "Tensor? ce_labels=None, Tensor? ce_mask=None, Tensor? class_weight=None, Tensor(a!)? "
      "y=None, "
      "Tensor(b!)? delta=None, Tensor(c!)? taken=None, Tensor(d!)? lse=None, "
      "Tensor(e!)? ce_lse=None, Tensor(f!)? ce_rows=None) -> ()");
}

namespace {

void softmax_pack_fwd(const Tensor& x, int64_t activation, int64_t target_activation,
                      double temperature, int64_t row0, int64_t rows, int64_t core0,
                      int64_t core_rows, double label_smoothing, const MaybeTensor& valid,
                      const MaybeTensor& target, const MaybeTensor& elements,
                      const MaybeTensor& from_target, const MaybeTensor& labels,
                      const MaybeTensor& topk_values, const MaybeTensor& topk_indices,
                      const MaybeTensor& topk_rest, const MaybeTensor& ce_labels,
                      const MaybeTensor& ce_mask, const MaybeTensor& class_weight,
                      const MaybeTensor& y, const MaybeTensor& delta, const MaybeTensor& taken,
                      const MaybeTensor& lse, const MaybeTensor& ce_lse,
                      const MaybeTensor& ce_rows) {
  STD_TORCH_CHECK(x.dim() == 4, "gpl_fast: x must be [N, C, H, W], got ", text(x.sizes()));
  SoftmaxPackFwd a = {};
  a.N = x.size(0), a.C = x.size(1), a.H = x.size(2), a.W = x.size(3);
  a.strip = {row0, rows};
  a.core = {core0, core_rows};
  a.activation = activation_of(activation, "activation");
  a.target_activation = activation_of(target_activation, "target_activation");
  check_temperature(temperature);
  STD_TORCH_CHECK(rows >= 0, "gpl_fast: rows must not be negative, got ", rows);
  const bool own = a.target_activation == Activation::kNone && a.activation != Activation::kNone;
  a.inv_t = inverse_of(temperature), a.target_inv_t = own ? 1.0f : a.inv_t;
  // Times any log sum it is less than half an ulp of float's largest number.
  a.lse_t = (float)std::min(temperature, 0x1p96);
  a.x_dtype = float_dtype(x, "x");
  a.x = x.data_ptr();
  a.x_strides = strides(x);
  const Shape plane = {a.N, a.H, a.W};
  a.valid = valid_of(valid, plane);
  STD_TORCH_CHECK((target ? 1 : 0) + (labels ? 1 : 0) + (topk_values ? 1 : 0) <= 1,
                  "gpl_fast: at most one of target, labels and topk_values");
  if (target) {
    check_shape(*target, "target", {a.N, a.C, a.H, a.W});
    const Shape all = {a.N, a.C, a.H, a.W};
    if (target->scalar_type() == ScalarType::Byte) {
      a.target_dtype = DType::kLabels;
      a.target = planes(*target, "target (labels)", ScalarType::Byte, all);
    } else {
      a.target_dtype = float_dtype(*target, "target");
      a.target = target->data_ptr();
    }
    a.target_strides = strides(*target);
    if (elements) {
      a.elements = (const uint8_t*)planes(*elements, "elements", ScalarType::Byte, all);
      a.elements_strides = strides(*elements);
    }
  }
  a.labels = contiguous<int64_t>(labels, "labels", ScalarType::Long, plane);
  if (topk_values) {
    STD_TORCH_CHECK(topk_values->dim() == 4, "gpl_fast: topk_values must be [N, k, H, W]");
    STD_TORCH_CHECK(topk_indices, "gpl_fast: topk_values needs topk_indices");
    a.k = topk_values->size(1);
    const Shape list = {a.N, a.k, a.H, a.W};
    a.topk_values = (const float*)planes(*topk_values, "topk_values", ScalarType::Float, list);
    a.topk_indices = (const int64_t*)planes(*topk_indices, "topk_indices", ScalarType::Long, list);
    a.topk_image_stride = topk_values->stride(0), a.topk_stride = topk_values->stride(1);
    STD_TORCH_CHECK(
        topk_indices->stride(0) == a.topk_image_stride && topk_indices->stride(1) == a.topk_stride,
        "gpl_fast: topk_values and topk_indices must have the same strides, got ",
        text(topk_values->strides()), " and ", text(topk_indices->strides()));
    a.topk_rest = contiguous<float>(topk_rest, "topk_rest", ScalarType::Float, plane);
  }
  const bool shared = a.activation == Activation::kSoftmax && temperature == 1.0;
  a.ce =
      cross_entropy(ce_labels, ce_mask, class_weight, label_smoothing, !shared, a.N, a.C, a.H, a.W);
  STD_TORCH_CHECK(y.has_value() || !(delta || taken), "gpl_fast: delta and taken need y");
  if (y) {
    STD_TORCH_CHECK(y->dim() == 4 && y->size(3) >= a.C,
                    "gpl_fast: y must be [N, rows, W, c_pad] with c_pad >= C = ", a.C, ", got ",
                    text(y->sizes()));
    STD_TORCH_CHECK(delta.has_value() == target.has_value(),
                    "gpl_fast: delta and target go together");
    a.from_target = from_target_of(from_target, a.N);
    STD_TORCH_CHECK(!target || from_target, "gpl_fast: target needs from_target");
    STD_TORCH_CHECK(taken.has_value() == (labels || topk_values),
                    "gpl_fast: taken goes together with labels or topk_values");
    a.c_pad = y->size(3);
    a.dtype = float_dtype(*y, "y");
    const Shape map = {a.N, rows, a.W, a.c_pad};
    a.y_image_stride = image_stride(y, "y", y->scalar_type(), map);
    a.delta_image_stride = image_stride(delta, "delta", y->scalar_type(), map);
    a.y = data(y);
    a.delta = data(delta);
    a.taken = contiguous<uint8_t>(taken, "taken", ScalarType::Byte, {a.N, rows, a.W});
  }
  a.lse = contiguous<float>(lse, "lse", ScalarType::Float, plane);
  a.ce_lse = contiguous<float>(ce_lse, "ce_lse", ScalarType::Float, plane);
  a.ce_rows = contiguous<double>(ce_rows, "ce_rows", ScalarType::Double, {a.N, a.H, 2});
  STD_TORCH_CHECK(!ce_labels || ce_rows, "gpl_fast: ce_labels needs ce_rows");
  if (a.N * a.C * a.W * rows == 0) return;
  cpu::softmax_pack_fwd(a);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gpl_fast, CPU, m) {
  m.impl("softmax_pack_fwd", TORCH_BOX(&softmax_pack_fwd));
}

}  // namespace gpl_fast
