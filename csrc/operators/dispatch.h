// What every operator has beside its checks: the registration of its schema and implementations,
// and the call of its stage where its tensors are.
//
// GPL_FAST_CUDA is defined where csrc/cuda is built in, as the text that cuda_build() gives.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../stages.h"
#include "checks.h"

#ifdef GPL_FAST_CUDA
// Weak: a CPU build of torch has no such function, and the library has to load beside it too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device,
                                                                                   void** stream);
#endif

namespace gpl_fast {

// GPL_FAST_RUN: a stage where its tensors are; on a GPU, on that device's current stream.
#ifdef GPL_FAST_CUDA
template <class Args>
void on_current_stream(const Tensor& t, const Args& a, void (*stage)(const Args&, void*)) {
  const auto device = t.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  stage(a, stream);
}
#define GPL_FAST_RUN(stage, t, a) \
  (t).is_cuda() ? on_current_stream(t, a, cuda::stage) : cpu::stage(a)
#else
#define GPL_FAST_RUN(stage, t, a) cpu::stage(a)
#endif

}  // namespace gpl_fast
