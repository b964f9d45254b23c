// The sum of each image's squares or absolute values of a difference, and their gradient.
#include <torch/csrc/stable/ops.h>

#include "dispatch.h"

namespace gpl_fast {

STABLE_TORCH_LIBRARY_FRAGMENT(gpl_fast, m) {
  m.def(
      "diff_reduce_fwd(Tensor delta, int criterion=0, Tensor? weight=None, "
      "Tensor(a!)? seed=None) -> Tensor");
}

namespace {

Tensor diff_reduce_fwd(const Tensor& delta, int64_t criterion, const MaybeTensor& weight,
                       const MaybeTensor& seed) {
  STD_TORCH_CHECK(delta.dim() >= 1, "gpl_fast: delta must be [N, ...]");
  STD_TORCH_CHECK(delta.is_contiguous(), "gpl_fast: delta must be contiguous");
  DiffReduceFwd a = {};
  a.N = delta.size(0);
  a.M = a.N == 0 ? 0 : delta.numel() / a.N;
  a.C = delta.size(delta.dim() - 1);
  a.dtype = float_dtype(delta, "delta");
  a.criterion = criterion_of(criterion);
  a.delta = delta.data_ptr();
  a.weight = contiguous<float>(weight, "weight", ScalarType::Float, {a.C});
  if (seed) {
    check_dtype(*seed, "seed", delta.scalar_type());
    STD_TORCH_CHECK(seed->is_contiguous() && seed->numel() == delta.numel(),
                    "gpl_fast: seed must be contiguous, of the shape of delta");
    a.seed = seed->data_ptr();
  }
  Tensor sum = torch::stable::new_empty(delta, {a.N}, ScalarType::Double);
  a.sum = (double*)sum.data_ptr();
  if (a.N > 0) cpu::diff_reduce_fwd(a);
  return sum;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gpl_fast, CPU, m) {
  m.impl("diff_reduce_fwd", TORCH_BOX(&diff_reduce_fwd));
}

}  // namespace gpl_fast
