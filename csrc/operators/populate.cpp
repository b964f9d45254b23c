// Fresh memory, mapped before a stage writes it.
#include "dispatch.h"

namespace gpl_fast {

STABLE_TORCH_LIBRARY_FRAGMENT(gpl_fast, m) { m.def("populate(Tensor(a!) t) -> ()"); }

namespace {

void populate(const Tensor& t) {
  int64_t reach = t.numel() == 0 ? 0 : 1;
  for (int64_t i = 0; i < t.dim(); ++i) reach += (t.size(i) - 1) * t.stride(i);
  STD_TORCH_CHECK(t.numel() == 0 || reach == t.numel(),
                  "gpl_fast: t must be dense in memory, strides ", text(t.strides()));
  cpu::populate(t.data_ptr(), t.numel() * t.element_size());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gpl_fast, CPU, m) { m.impl("populate", TORCH_BOX(&populate)); }

}  // namespace gpl_fast
