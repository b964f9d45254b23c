// What the library was built for, and what of it this machine runs.
#include <string>

#include "dispatch.h"

namespace gpl_fast {

STABLE_TORCH_LIBRARY_FRAGMENT(gpl_fast, m) {
  m.def("cpu_capability() -> str");
  m.def("cpu_bfloat16() -> str");
  m.def("cuda_build() -> str");
}

namespace {

std::string cpu_capability() { return cpu::capability(); }

std::string cpu_bfloat16() {
  const char* const names[] = {"none", "pairs", "matrix"};
  return names[(int)cpu::bfloat16_unit()];
}

std::string cuda_build() {
#ifdef GPL_FAST_CUDA
  return GPL_FAST_CUDA;
#else
  return "";
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gpl_fast, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
  m.impl("cpu_bfloat16", TORCH_BOX(&cpu_bfloat16));
  m.impl("cuda_build", TORCH_BOX(&cuda_build));
}

}  // namespace gpl_fast
