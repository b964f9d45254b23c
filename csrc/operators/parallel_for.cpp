// The CPU stages' loops on torch's own threads.
#include <torch/csrc/stable/ops.h>

#include <mutex>
#include <stdexcept>
#include <string>

#include "../stages.h"

namespace gpl_fast {

void parallel_for(int64_t n, int64_t grain, ParallelBody body, void* ctx) {
  // Torch's stable ABI would say of an exception that there was one, and not which.
  struct Call {
    ParallelBody body;
    void* ctx;
    std::mutex lock;
    std::string error;
  } call = {body, ctx, {}, {}};
  auto caught = [](int64_t begin, int64_t end, void* of) {
    Call& c = *(Call*)of;
    try {
      c.body(begin, end, c.ctx);
    } catch (const std::exception& error) {
      const std::lock_guard<std::mutex> hold(c.lock);
      if (c.error.empty()) c.error = error.what();
    }
  };
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, n, grain, caught, &call));
  if (!call.error.empty()) throw std::runtime_error(call.error);
}

}  // namespace gpl_fast
