// Who computes each stage: csrc/cpu, and of the backward csrc/cuda. Free of torch headers.
#pragma once

#include "arguments.h"

namespace gpl_fast {

// Calls body(begin, end, ctx) over [0, n) on torch's own threads (operators/parallel_for.cpp).
using ParallelBody = void (*)(int64_t begin, int64_t end, void* ctx);
void parallel_for(int64_t n, int64_t grain, ParallelBody body, void* ctx);

#define GPL_FAST_STAGES(STAGE)            \
  STAGE(softmax_pack_fwd, SoftmaxPackFwd) \
  STAGE(label_conv_fwd, LabelConvFwd)     \
  STAGE(winograd_weight, WinogradWeight)  \
  STAGE(winograd, Winograd)               \
  STAGE(direct_weight, DirectWeight)      \
  STAGE(direct_conv, DirectConv)          \
  STAGE(relu_fwd, ReluFwd)                \
  STAGE(relu_pool_fwd, ReluPoolFwd)       \
  STAGE(diff_reduce_fwd, DiffReduceFwd)   \
  STAGE(unit_diff_fwd, UnitDiffFwd)       \
  STAGE(relu_pool_bwd, ReluPoolBwd)       \
  STAGE(relu_bwd, ReluBwd)                \
  STAGE(softmax_bwd, SoftmaxBwd)          \
  STAGE(binary_ce_fwd, BinaryCeFwd)       \
  STAGE(binary_ce_bwd, BinaryCeBwd)

namespace cpu {
#define GPL_FAST_DECLARE(stage, Args) void stage(const Args& args);
GPL_FAST_STAGES(GPL_FAST_DECLARE)
#undef GPL_FAST_DECLARE
const char* capability();
// Maps the pages of memory that will be written all over, in a scattered order.
void populate(void* data, int64_t bytes);
// Where scratch memory is not to be had: throws what says so. Not in the kernels' own headers,
// whose code is compiled for other instructions.
[[noreturn]] void out_of_memory(int64_t bytes);
// What multiplies bfloat16 faster than float32 here: pairs twice as fast, matrices many times.
enum class Bfloat16Unit { kNone, kPairs, kMatrix };
Bfloat16Unit bfloat16_unit();
}  // namespace cpu

namespace cuda {  // stream: a cudaStream_t
void conv_block_fwd(const ConvBlockFwd& args, void* stream);
void conv_block_bwd(const ConvBlockBwd& args, void* stream);
void relu_pool_bwd(const ReluPoolBwd& args, void* stream);
void relu_bwd(const ReluBwd& args, void* stream);
void softmax_bwd(const SoftmaxBwd& args, void* stream);
void binary_ce_bwd(const BinaryCeBwd& args, void* stream);
}  // namespace cuda

}  // namespace gpl_fast
