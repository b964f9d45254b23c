// The launch of conv_block_fwd's sm_90a version.
//
// Opt-in: no step takes it by itself; conv_block_fwd of csrc/operators is its only caller.
#include "conv_block_fwd_sm90.cuh"

namespace gpl_fast::cuda {
namespace {

template <class T, int kChannels>
void launch(const ConvBlockFwd& a, const HaloArgs& args, cudaStream_t stream) {
  using L = HaloLayout<kChannels>;
  const auto kernel = conv_block_fwd_sm90_kernel<T, kChannels>;
  if (!compiled_for_sm90a(kernel)) {  // or this GPU is another one
    throw std::runtime_error("gpl_fast: conv_block_fwd: no kernel for sm_90a on this GPU");
  }
  constexpr bool kBFloat16 = std::is_same_v<T, __nv_bfloat16>;
  auto boxes = [&](const void* p, int64_t image_stride) {
    return tensor_map(p, kBFloat16, MapShape{a.N, a.H_in, a.W, a.C_in, image_stride}, L::kRows + 2,
                      kHaloWidth, 64);
  };
  const TensorMap map = boxes(a.a, a.a_image_stride), delta = boxes(a.d, a.d_image_stride);
  const TensorMap weights = tensor_map(a.weight, kBFloat16, 9 * a.C_in, a.C_out, 64, 64);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, L::kBytes);
  const dim3 grid = grid_of("conv_block_fwd", a.N * args.tiles * args.channel_tiles);
  LAUNCH(kernel, grid, dim3(kHaloThreads), L::kBytes, stream, args, map, delta, weights);
  check_launch("conv_block_fwd");
}

template <class T>
void launch_tile(const ConvBlockFwd& a, cudaStream_t stream) {
  const int channels = conv_block_fwd_channels(a.C_out);
  HaloArgs args = {};
  args.conv = a;
  args.tiles_w = ceil_div(a.W, kHaloWidth), args.channel_tiles = a.C_out / channels;
  args.tiles = conv_block_fwd_programs(a.rows, a.W, a.C_out) / args.channel_tiles;
  if (channels == 128) {
    launch<T, 128>(a, args, stream);
  } else {
    launch<T, 64>(a, args, stream);
  }
}

}  // namespace

void conv_block_fwd(const ConvBlockFwd& a, void* stream) {
  if (a.dtype == DType::kBFloat16) {
    launch_tile<__nv_bfloat16>(a, (cudaStream_t)stream);
  } else {
    launch_tile<__half>(a, (cudaStream_t)stream);
  }
}

}  // namespace gpl_fast::cuda
