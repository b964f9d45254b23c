// The data gradient of a block: dx = conv_transpose(dZ, w), eq. (3) and (4), and eq. (5) where dx
// is the gradient of the logits' map.
//
// Opt-in: runs for a layer where a measured row says that it beats ATen's convolution on this GPU,
// in float32 only where TF32 is allowed. Rows are read from the file that GPL_FAST_DATA_GRADIENT
// names and from the package's data_gradient.json, which ships without any.
#include "conv_block_bwd.cuh"

#include <cstdlib>
#include <cstring>

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

// GPL_FAST_SM90A=0 takes sm_80's kernels on sm_90 too, to compare the two.
bool sm90a_allowed() {
  const char* text = std::getenv("GPL_FAST_SM90A");
  return !text || std::strcmp(text, "0") != 0;
}

// False where shared memory does not hold it.
template <bool kLogits, Math kMath, int BN>
bool launch(const ConvBlockBwd& a, cudaStream_t stream) {
  using L = Layout<kMath, BN, kLogits>;
  const int limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  ConvBlockArgs args = conv_block_args(a, BN);
  args.dz_tiles = a.C_out > DzTile<Element<kMath>>::kChunk && L::bytes(a, 2) <= limit ? 2 : 1;
  const int bytes = L::bytes(a, args.dz_tiles);
  if (bytes > limit) return false;
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
  return true;
}

// The narrowest tile of channels that holds them all, or the widest that fits shared memory.
template <Math kMath>
bool launch_tile(const ConvBlockBwd& a, cudaStream_t stream) {
  if (!a.logits) {
    return (a.C_in > 64 && launch<false, kMath, 128>(a, stream)) ||
           launch<false, kMath, 64>(a, stream);
  }
  if constexpr (kMath != Math::kFloat32) {  // whose operands would not fit the registers
    if (a.C_in > 160 && launch<true, kMath, 256>(a, stream)) return true;
  }
  return (a.C_in > 64 && launch<true, kMath, 160>(a, stream)) ||
         (a.C_in > 32 && launch<true, kMath, 64>(a, stream)) || launch<true, kMath, 32>(a, stream);
}

}  // namespace

void conv_block_bwd(const ConvBlockBwd& a, void* stream_ptr) {
  const cudaStream_t stream = (cudaStream_t)stream_ptr;
  if (a.N * a.strip.rows * a.W * a.C_in == 0) return;
  if (device_attribute(cudaDevAttrComputeCapabilityMajor) == 9 && sm90a_allowed() &&
      conv_block_bwd_sm90(a, stream)) {
    return;
  }
  const bool launched = a.dtype == DType::kBFloat16  ? launch_tile<Math::kBFloat16>(a, stream)
                        : a.dtype == DType::kFloat16 ? launch_tile<Math::kFloat16>(a, stream)
                        : a.allow_tf32               ? launch_tile<Math::kTF32>(a, stream)
                                                     : launch_tile<Math::kFloat32>(a, stream);
  if (!launched) {
    throw std::runtime_error("gpl_fast: conv_block_bwd: a kernel of " + std::to_string(a.K) +
                             " does not fit this GPU's shared memory, expected at most 7");
  }
}

}  // namespace gpl_fast::cuda
