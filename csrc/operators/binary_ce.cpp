// The binary cross-entropy of logits with labels of single elements, and its gradient.
#include "dispatch.h"

namespace gpl_fast {

STABLE_TORCH_LIBRARY_FRAGMENT(gpl_fast, m) {
  m.def(
      "binary_ce_fwd(Tensor x, Tensor labels, int row0, int rows, Tensor(a!) ce_rows, "
      "float label_smoothing=0.0, Tensor? class_weight=None, Tensor? pos_weight=None, "
      "Tensor? ce_mask=None) -> ()");
  m.def(
      "binary_ce_bwd(Tensor x, Tensor labels, int row0, int rows, Tensor(a!) dx, bool clear, "
      "float label_smoothing=0.0, Tensor? ce_scale=None, Tensor? class_weight=None, "
      "Tensor? pos_weight=None, Tensor? ce_mask=None) -> ()");
}

namespace {

void binary_ce_args(BinaryCe& a, const Tensor& x, const Tensor& labels, int64_t row0, int64_t rows,
                    double label_smoothing, const MaybeTensor& class_weight,
                    const MaybeTensor& pos_weight, const MaybeTensor& ce_mask) {
  STD_TORCH_CHECK(x.dim() == 4, "gpl_fast: x must be [N, C, H, W], got ", text(x.sizes()));
  STD_TORCH_CHECK(rows >= 0, "gpl_fast: rows must not be negative, got ", rows);
  check_device(x, "x",
               {{"labels", labels},
                {"class_weight", class_weight},
                {"pos_weight", pos_weight},
                {"ce_mask", ce_mask}});
  a.N = x.size(0), a.C = x.size(1), a.H = x.size(2), a.W = x.size(3);
  a.strip = {row0, rows};
  a.x_dtype = float_dtype(x, "x");
  a.x = x.data_ptr();
  a.x_strides = strides(x);
  a.labels = (const uint8_t*)planes(labels, "labels", ScalarType::Byte, {a.N, a.C, a.H, a.W});
  a.labels_strides = strides(labels);
  a.label_smoothing = (float)label_smoothing;
  a.class_weight = contiguous<float>(class_weight, "class_weight", ScalarType::Float, {a.C});
  a.pos_weight = contiguous<float>(pos_weight, "pos_weight", ScalarType::Float, {a.C});
  a.mask = contiguous<float>(ce_mask, "ce_mask", ScalarType::Float, {a.N, a.H, a.W});
}

void binary_ce_fwd(const Tensor& x, const Tensor& labels, int64_t row0, int64_t rows,
                   const Tensor& ce_rows, double label_smoothing, const MaybeTensor& class_weight,
                   const MaybeTensor& pos_weight, const MaybeTensor& ce_mask) {
  BinaryCeFwd a = {};
  binary_ce_args(a, x, labels, row0, rows, label_smoothing, class_weight, pos_weight, ce_mask);
  a.sums = (double*)contiguous(ce_rows, "ce_rows", ScalarType::Double, {a.N, a.H, 2});
  if (a.N * a.C * a.W * rows == 0) return;
  cpu::binary_ce_fwd(a);
}

void binary_ce_bwd(const Tensor& x, const Tensor& labels, int64_t row0, int64_t rows,
                   const Tensor& dx, bool clear, double label_smoothing,
                   const MaybeTensor& ce_scale, const MaybeTensor& class_weight,
                   const MaybeTensor& pos_weight, const MaybeTensor& ce_mask) {
  BinaryCeBwd a = {};
  binary_ce_args(a, x, labels, row0, rows, label_smoothing, class_weight, pos_weight, ce_mask);
  check_device(x, "x", {{"dx", dx}, {"ce_scale", ce_scale}});
  check_shape(dx, "dx", {a.N, a.C, a.H, a.W});
  check_dtype(dx, "dx", x.scalar_type());
  a.dx = dx.data_ptr();
  a.dx_strides = strides(dx);
  a.clear = clear;
  a.scale = contiguous<float>(ce_scale, "ce_scale", ScalarType::Float, {a.N});
  if (a.N * a.C * a.W * rows == 0 || !(a.scale || clear)) return;
  GPL_FAST_RUN(binary_ce_bwd, dx, a);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gpl_fast, CPU, m) {
  m.impl("binary_ce_fwd", TORCH_BOX(&binary_ce_fwd));
  m.impl("binary_ce_bwd", TORCH_BOX(&binary_ce_bwd));
}

#ifdef GPL_FAST_CUDA
STABLE_TORCH_LIBRARY_IMPL(gpl_fast, CUDA, m) { m.impl("binary_ce_bwd", TORCH_BOX(&binary_ce_bwd)); }
#endif

}  // namespace gpl_fast
