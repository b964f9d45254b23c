// The launches of softmax_bwd.
#include "softmax_bwd.cuh"

namespace gpl_fast::cuda {
namespace {

// Warps and shared memory of a block, up to kFewChannels and beyond: there the logits of fewer
// pixels are in flight, and the second reading finds them in the L2 cache. Any GPU has 99 KiB.
constexpr int kFewChannels = 512, kFewWarps = 4;
constexpr int64_t kFewBytes = 44 << 10, kManyBytes = 80 << 10;
constexpr int kUnitsOfWarp = 10;  // so many at least, before several warps share their pixels

template <class X, class D>
LogitsWork work_of(const SoftmaxBwd& a, int warps, int64_t most_bytes) {
  LogitsWork work = {};
  auto planes = [](const Strides& s) { return s.c != 1 || s.w == 1; };
  work.x_planes = planes(a.x_strides), work.dx_planes = planes(a.dx_strides);
  work.dy_aligned =
      aligned(a.dy, 16) && a.dy_image_stride * sizeof(D) % 16 == 0 && a.c_pad * sizeof(D) % 16 == 0;
  while (1 << work.log2_warps < warps && ceil_div(a.C, kUnit) >> work.log2_warps > kUnitsOfWarp) {
    ++work.log2_warps;
  }
  const int teams = warps >> work.log2_warps;
  const int units = kUnit << work.log2_warps;  // whole ones: whatever the layout, the same sums
  work.chunk = (int)padded_to(a.C, units) + units;
  do {
    work.chunk -= units;
    const bool tile = !work.x_planes || !work.dx_planes;
    work.dy_bytes = a.dy ? (int)ChannelTile<D>::bytes(work.chunk) : 0;
    work.team_bytes = work.dy_bytes + (tile ? (int)ChannelTile<X>::bytes(work.chunk) : 0);
  } while (work.team_bytes * teams > most_bytes);
  work.chunks = (int)ceil_div(a.C, work.chunk);
  work.tiles = ceil_div(a.strip.rows * a.W, teams * kLanes);
  return work;
}

template <class X, class D>
void launch(const SoftmaxBwd& a, cudaStream_t stream) {
  const bool few = a.C <= kFewChannels;
  const int warps = few ? kFewWarps : kMostWarps;
  const LogitsWork work = work_of<X, D>(a, warps, few ? kFewBytes : kManyBytes);
  const int bytes =
      (warps >> work.log2_warps) * work.team_bytes + warps * kLanes * (int)sizeof(LogitsSums);
  const dim3 grid = grid_of("softmax_bwd", a.N * work.tiles);
  auto run = [&](auto kernel) {
    if (bytes > 48 << 10) {  // what a launch may take unasked
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    }
    LAUNCH(kernel, grid, dim3(warps * kLanes), bytes, stream, a, work);
    check_launch("softmax_bwd");
  };
  if (!work.x_planes || !work.dx_planes) {
    run(softmax_bwd_kernel<X, D, LogitsForm::kAny>);
  } else if (a.ce.labels) {
    run(softmax_bwd_kernel<X, D, LogitsForm::kCrossEntropy>);
  } else if (a.activation == Activation::kSoftmax) {
    run(softmax_bwd_kernel<X, D, LogitsForm::kSoftmax>);
  } else {
    run(softmax_bwd_kernel<X, D, LogitsForm::kOtherActivation>);
  }
}

}  // namespace

void softmax_bwd(const SoftmaxBwd& a, void* stream) {
  if (a.N * a.C * a.W * a.strip.rows == 0) return;
  with_dtype(a.x_dtype, [&](auto x) {
    with_dtype(a.dy ? a.dtype : DType::kFloat32,
               [&](auto d) { launch<decltype(x), decltype(d)>(a, (cudaStream_t)stream); });
  });
}

}  // namespace gpl_fast::cuda
