// The data gradient of a block: dx = conv_transpose(dZ, w), eq. (3) and (4), and eq. (5) where dx
// is the gradient of the logits' map.
#include "conv_block_bwd.cuh"

namespace gpl_fast::cuda {

ConvBlockArgs conv_block_args(const ConvBlockBwd& a, int channels) {
  ConvBlockArgs r = {};
  r.conv = a;
  if (a.logits) r.logits = *a.logits;
  const int64_t rows = a.stride == 1 ? a.strip.rows : ceil_div(a.H, a.stride);
  r.tiles_h = (int)ceil_div(rows, kTileH);
  r.tiles_w = (int)ceil_div(ceil_div(a.W, a.stride), kTileW);
  const int tiles = (int)ceil_div(a.C_in, channels);
  r.channel_tiles = a.logits ? 1 : tiles;
  r.class_tiles = a.logits ? tiles : 1;
  r.out_pad = padded_to(a.C_out, 64), r.in_pad = padded_to(a.C_in, 8);
  const int64_t size = a.dtype == DType::kFloat32 ? 4 : 2;
  r.aligned = a.C_out % 8 == 0 && aligned(a.dy, 16) && a.dy_image_stride * size % 16 == 0 &&
              aligned(a.code, 4) && a.code_image_stride % 4 == 0;
  r.dx_aligned = a.C_in % 8 == 0 && aligned(a.dx, 16) && a.dx_image_stride * size % 16 == 0;
  r.tf32 = a.dtype == DType::kFloat32 && a.allow_tf32;
  return r;
}

int64_t conv_block_count(const ConvBlockArgs& a) {
  return a.conv.N * a.conv.stride * a.conv.stride * a.tiles_h * a.tiles_w * a.channel_tiles;
}

namespace {

int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

template <bool kLogits, Math kMath, int BN>
void launch(const ConvBlockBwd& a, cudaStream_t stream) {
  const ConvBlockArgs args = conv_block_args(a, BN);
  const int bytes = Layout<kMath, BN>::bytes(a);
  const dim3 grid = grid_of("conv_block_bwd", conv_block_count(args));
  const dim3 block(Shape<kMath, BN>::kThreads);
  void (*kernel)(ConvBlockArgs);
  if constexpr (kLogits) {
    kernel = conv_block_logits_bwd_kernel<kMath, BN>;
  } else {
    kernel = conv_block_bwd_kernel<kMath, BN>;
  }
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  LAUNCH(kernel, grid, block, bytes, stream, args);
  check_launch("conv_block_bwd");
}

template <bool kLogits, Math kMath, int BN>
bool launched(const ConvBlockBwd& a, cudaStream_t stream) {
  if (Layout<kMath, BN>::bytes(a) > device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)) {
    return false;
  }
  launch<kLogits, kMath, BN>(a, stream);
  return true;
}

// The narrowest tile of channels that holds them all, or the widest that fits shared memory.
template <Math kMath>
void launch_tile(const ConvBlockBwd& a, cudaStream_t stream) {
  if (!a.logits) {
    if (a.C_in > 64 && launched<false, kMath, 128>(a, stream)) return;
    return launch<false, kMath, 64>(a, stream);
  }
  if (a.C_in <= 32) return launch<true, kMath, 32>(a, stream);
  if (a.C_in > 160 && launched<true, kMath, 256>(a, stream)) return;
  if (a.C_in > 64 && launched<true, kMath, 160>(a, stream)) return;
  launch<true, kMath, 64>(a, stream);
}

}  // namespace

void conv_block_bwd(const ConvBlockBwd& a, void* stream_ptr) {
  const cudaStream_t stream = (cudaStream_t)stream_ptr;
  if (a.N * a.strip.rows * a.W * a.C_in == 0) return;
  if (a.dtype == DType::kBFloat16) return launch_tile<Math::kBFloat16>(a, stream);
  if (a.dtype == DType::kFloat16) return launch_tile<Math::kFloat16>(a, stream);
  if (a.allow_tf32) return launch_tile<Math::kTF32>(a, stream);
  return launch_tile<Math::kFloat32>(a, stream);
}

}  // namespace gpl_fast::cuda
