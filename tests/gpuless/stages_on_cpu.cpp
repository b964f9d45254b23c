// In the place of csrc/cpu where only the CUDA stages are tested: none of these may be reached.
#include <stdexcept>

#include "stages.h"

namespace gpl_fast::cpu {

#define GPL_FAST_DEFINE(stage, Args) \
  void stage(const Args&) { throw std::runtime_error("a CPU stage was reached"); }
GPL_FAST_STAGES(GPL_FAST_DEFINE)
#undef GPL_FAST_DEFINE

void populate(void*, int64_t) {}
Bfloat16Unit bfloat16_unit() { return Bfloat16Unit::kNone; }
const char* capability() { return "none"; }

}  // namespace gpl_fast::cpu
