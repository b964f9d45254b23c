// The binary cross-entropy's gradient, added to the perceptual one; 0 where a label does not count.
#include "binary_ce.cuh"

namespace gpl_fast::cuda {
namespace {

template <class X>
void launch(const BinaryCeBwd& a, cudaStream_t stream) {
  if (a.C > 1 && a.dx_strides.c == 1) {
    const int64_t tiles = ceil_div(a.W, kSide);
    const dim3 grid = grid_of("binary_ce_bwd", a.N * a.strip.rows * tiles);
    LAUNCH(binary_ce_channels_kernel<X>, grid, dim3(kThreads), 0, stream, a, tiles);
  } else {
    const int64_t tiles = ceil_div(a.strip.rows * a.W, kThreads * kPixels);
    const dim3 grid = grid_of("binary_ce_bwd", a.N * a.C * tiles);
    LAUNCH(binary_ce_planes_kernel<X>, grid, dim3(kThreads), 0, stream, a, tiles);
  }
  check_launch("binary_ce_bwd");
}

}  // namespace

void binary_ce_bwd(const BinaryCeBwd& a, void* stream) {
  if (a.N * a.C * a.W * a.strip.rows == 0) return;
  with_dtype(a.x_dtype, [&](auto x) { launch<decltype(x)>(a, (cudaStream_t)stream); });
}

}  // namespace gpl_fast::cuda
