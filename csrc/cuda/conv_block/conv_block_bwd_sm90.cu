// The launch of conv_block_bwd's sm_90a version.
//
// Opt-in by a measured row of the layer (conv_block_bwd.cu): then it runs on GPUs of compute
// capability 9.0 in bfloat16 and float16, kernels up to 7 x 7, unless GPL_FAST_SM90A=0.
#include "conv_block_bwd_sm90.cuh"

namespace gpl_fast::cuda {
namespace {

template <class T, int BN, bool kLogits>
bool launch(const ConvBlockBwd& a, cudaStream_t stream) {
  const auto kernel = conv_block_bwd_sm90_kernel<T, BN, kLogits>;
  static const bool there = compiled_for_sm90a(kernel);
  if (!there) return false;
  const int bytes = HopperLayout<BN, kLogits>::bytes((int)a.K);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  const ConvBlockArgs args = conv_block_args(a, BN);
  const TensorMap weights = tensor_map(a.w, std::is_same_v<T, __nv_bfloat16>,
                                       a.K * a.K * args.out_pad, args.in_pad, 64, 64);
  const dim3 grid = grid_of("conv_block_bwd", conv_block_count(args));
  LAUNCH(kernel, grid, dim3(kHopperThreads), bytes, stream, args, weights);
  check_launch("conv_block_bwd");
  return true;
}

template <class T>
bool launch_tile(const ConvBlockBwd& a, cudaStream_t stream) {
  if (!a.logits) {
    return a.C_in > 64 ? launch<T, 128, false>(a, stream) : launch<T, 64, false>(a, stream);
  }
  if (a.C_in <= 32) return launch<T, 32, true>(a, stream);
  if (a.C_in <= 64) return launch<T, 64, true>(a, stream);
  return a.C_in <= 160 ? launch<T, 160, true>(a, stream) : launch<T, 256, true>(a, stream);
}

}  // namespace

bool conv_block_bwd_sm90(const ConvBlockBwd& a, cudaStream_t stream) {
  if (a.K > 7 || !aligned(a.w, 16)) return false;
  if (a.dtype == DType::kBFloat16) return launch_tile<__nv_bfloat16>(a, stream);
  if (a.dtype == DType::kFloat16) return launch_tile<__half>(a, stream);
  return false;
}

}  // namespace gpl_fast::cuda
