// The gradient of the first maps -> the logits', and the cross-entropy's.
#include "softmax_bwd.h"

#include "dispatch.h"

namespace gpl_fast {

STABLE_TORCH_LIBRARY_FRAGMENT(gpl_fast, m) {
  m.def(
      "softmax_bwd(Tensor x, int activation, float temperature, int row0, int rows, "
      "Tensor(a!) dx, float label_smoothing=0.0, Tensor? lse=None, Tensor? dy=None, "
      "Tensor? scale=None, Tensor? valid=None, Tensor? ce_labels=None, Tensor? ce_mask=None, "
      "Tensor? ce_lse=None, Tensor? ce_scale=None, Tensor? class_weight=None) -> ()");
}

SoftmaxBwd softmax_bwd_args(const Tensor& x, int64_t activation, double temperature, int64_t row0,
                            int64_t rows, const Tensor& dx, double label_smoothing,
                            const MaybeTensor& lse, const MaybeTensor& dy, const MaybeTensor& scale,
                            const MaybeTensor& valid, const MaybeTensor& ce_labels,
                            const MaybeTensor& ce_mask, const MaybeTensor& ce_lse,
                            const MaybeTensor& ce_scale, const MaybeTensor& class_weight,
                            bool fused) {
  STD_TORCH_CHECK(x.dim() == 4, "gpl_fast: x must be [N, C, H, W], got ", text(x.sizes()));
  check_device(dx, "dx",
               {{"x", x},
                {"lse", lse},
                {"dy", dy},
                {"scale", scale},
                {"valid", valid},
                {"ce_labels", ce_labels},
                {"ce_mask", ce_mask},
                {"ce_lse", ce_lse},
                {"ce_scale", ce_scale},
                {"class_weight", class_weight}});
  SoftmaxBwd a = {};
  a.N = x.size(0), a.C = x.size(1), a.H = x.size(2), a.W = x.size(3);
  a.strip = {row0, rows};
  a.activation = activation_of(activation, "activation");
  check_temperature(temperature);
  STD_TORCH_CHECK(rows >= 0, "gpl_fast: rows must not be negative, got ", rows);
  STD_TORCH_CHECK(fused || dy || ce_labels, "gpl_fast: softmax_bwd needs dy or ce_labels");
  a.inv_t = inverse_of(temperature);
  a.x_dtype = float_dtype(x, "x");
  a.x = x.data_ptr();
  a.x_strides = strides(x);
  check_shape(dx, "dx", {a.N, a.C, a.H, a.W});
  check_dtype(dx, "dx", x.scalar_type());
  a.dx = dx.data_ptr();
  a.dx_strides = strides(dx);
  const Shape plane = {a.N, a.H, a.W};
  a.lse = contiguous<float>(lse, "lse", ScalarType::Float, plane);
  a.valid = valid_of(valid, plane);
  if (dy) {
    STD_TORCH_CHECK(dy->dim() == 4 && dy->size(3) >= a.C,
                    "gpl_fast: dy must be [N, rows, W, c_pad] with c_pad >= C = ", a.C, ", got ",
                    text(dy->sizes()));
    a.c_pad = dy->size(3);
    a.dtype = float_dtype(*dy, "dy");
    a.dy_image_stride = image_stride(dy, "dy", dy->scalar_type(), {a.N, rows, a.W, a.c_pad});
    a.dy = dy->data_ptr();
  }
  if (dy || fused) {
    STD_TORCH_CHECK(scale, "gpl_fast: dy needs scale");
    STD_TORCH_CHECK(a.activation != Activation::kSoftmax || lse, "gpl_fast: softmax needs lse");
    a.scale = contiguous<float>(scale, "scale", ScalarType::Float, {a.N});
  }
  const bool shared = a.activation == Activation::kSoftmax && temperature == 1.0;
  a.ce =
      cross_entropy(ce_labels, ce_mask, class_weight, label_smoothing, !shared, a.N, a.C, a.H, a.W);
  a.ce_lse = contiguous<float>(ce_lse, "ce_lse", ScalarType::Float, plane);
  a.ce_scale = contiguous<float>(ce_scale, "ce_scale", ScalarType::Float, {a.N});
  if (ce_labels) {
    STD_TORCH_CHECK(ce_scale, "gpl_fast: ce_labels needs ce_scale");
    if (shared) a.ce_lse = a.lse;
    STD_TORCH_CHECK(a.ce_lse, "gpl_fast: ce_labels needs ce_lse",
                    " (lse where softmax has temperature 1)");
  }
  return a;
}

namespace {

void softmax_bwd(const Tensor& x, int64_t activation, double temperature, int64_t row0,
                 int64_t rows, const Tensor& dx, double label_smoothing, const MaybeTensor& lse,
                 const MaybeTensor& dy, const MaybeTensor& scale, const MaybeTensor& valid,
                 const MaybeTensor& ce_labels, const MaybeTensor& ce_mask,
                 const MaybeTensor& ce_lse, const MaybeTensor& ce_scale,
                 const MaybeTensor& class_weight) {
  const SoftmaxBwd a =
      softmax_bwd_args(x, activation, temperature, row0, rows, dx, label_smoothing, lse, dy, scale,
                       valid, ce_labels, ce_mask, ce_lse, ce_scale, class_weight, false);
  if (a.N * a.C * a.W * rows == 0) return;
  GPL_FAST_RUN(softmax_bwd, dx, a);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gpl_fast, CPU, m) { m.impl("softmax_bwd", TORCH_BOX(&softmax_bwd)); }

#ifdef GPL_FAST_CUDA
STABLE_TORCH_LIBRARY_IMPL(gpl_fast, CUDA, m) { m.impl("softmax_bwd", TORCH_BOX(&softmax_bwd)); }
#endif

}  // namespace gpl_fast
