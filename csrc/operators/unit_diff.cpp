// The sum of each image's squares or absolute values of the difference of two branches' features
// over their norms, each pixel's part of it, and its gradient by the prediction's.
#include <torch/csrc/stable/ops.h>

#include "dispatch.h"

namespace gpl_fast {

STABLE_TORCH_LIBRARY_FRAGMENT(gpl_fast, m) {
  m.def(
      "unit_diff_fwd(Tensor y, Tensor target, int criterion, float eps, bool eps_inside, "
      "Tensor? weight=None, Tensor(a!)? seed=None, Tensor(b!)? distances=None) -> Tensor");
}

namespace {

Tensor unit_diff_fwd(const Tensor& y, const Tensor& target, int64_t criterion, double eps,
                     bool eps_inside, const MaybeTensor& weight, const MaybeTensor& seed,
                     const MaybeTensor& distances) {
  STD_TORCH_CHECK(y.dim() == 4, "gpl_fast: y must be [N, H, W, C], got ", text(y.sizes()));
  const int64_t N = y.size(0), H = y.size(1), W = y.size(2), C = y.size(3);
  const Shape shape = {N, H, W, C};
  UnitDiffFwd a = {};
  a.N = N, a.pixels = H * W, a.C = C;
  a.criterion = criterion_of(criterion);
  a.eps = (float)eps, a.eps_inside = eps_inside;
  a.dtype = float_dtype(y, "y");
  a.y = y.data_ptr();
  a.y_image_stride = image_stride(y, "y", y.scalar_type(), shape);
  a.target_dtype = float_dtype(target, "target");
  a.target = target.data_ptr();
  a.target_image_stride = image_stride(target, "target", target.scalar_type(), shape);
  a.weight = contiguous<float>(weight, "weight", ScalarType::Float, {C});
  if (seed) {
    a.seed_dtype = float_dtype(*seed, "seed");
    a.seed = seed->data_ptr();
    a.seed_image_stride = image_stride(*seed, "seed", seed->scalar_type(), shape);
  }
  a.distances = (float*)data(distances);
  a.distances_image_stride = image_stride(distances, "distances", ScalarType::Float, {N, H, W});
  Tensor sum = torch::stable::new_empty(y, {N}, ScalarType::Double);
  a.sum = (double*)sum.data_ptr();
  if (N > 0) cpu::unit_diff_fwd(a);
  return sum;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gpl_fast, CPU, m) { m.impl("unit_diff_fwd", TORCH_BOX(&unit_diff_fwd)); }

}  // namespace gpl_fast
