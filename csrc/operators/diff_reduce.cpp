// The sum of squares of each image's difference.
#include <torch/csrc/stable/ops.h>

#include "dispatch.h"

namespace gpl_fast {

STABLE_TORCH_LIBRARY_FRAGMENT(gpl_fast, m) { m.def("diff_reduce_fwd(Tensor delta) -> Tensor"); }

namespace {

Tensor diff_reduce_fwd(const Tensor& delta) {
  STD_TORCH_CHECK(delta.dim() >= 1, "gpl_fast: delta must be [N, ...]");
  STD_TORCH_CHECK(delta.is_contiguous(), "gpl_fast: delta must be contiguous");
  DiffReduceFwd a = {};
  a.N = delta.size(0);
  a.M = a.N == 0 ? 0 : delta.numel() / a.N;
  a.dtype = float_dtype(delta, "delta");
  a.delta = delta.data_ptr();
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
