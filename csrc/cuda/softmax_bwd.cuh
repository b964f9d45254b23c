// The net's gradient, NHWC -> the logits' gradient in the caller's layout; the cross-entropy's
// gradient goes into the same write. y' is computed again from x and lse.
//
// A lane has a pixel, a warp 8 channels at a time of 32 neighbouring ones. Logits in planes come
// straight from memory, 128 bytes a plane, and their gradient goes straight back; what has its
// channels side by side, dy always, passes through shared memory. That holds all channels, or
// chunks of them, twice: for the sums, then, backwards, for the gradient.
#pragma once

#include "channel_tile.cuh"
#include "logits_gradient.cuh"

namespace gpl_fast::cuda {

constexpr int kMostWarps = 8;  // of a block

// What a launch is for: the usual one pays for no other. kAny does it all, for logits that are not
// in planes.
enum class LogitsForm { kSoftmax, kOtherActivation, kCrossEntropy, kAny };

// How a launch is divided.
struct LogitsWork {
  int64_t tiles;             // blocks of an image
  int log2_warps;            // that have the same pixels
  int chunk, chunks;         // of channels
  int dy_bytes, team_bytes;  // of the tile of dy; of a team's tiles
  bool x_planes, dx_planes, dy_aligned;
};

// Where a lane's pixel is; `pixels` lie from `first` on in the strip's rows of image n.
struct LanePixel {
  int64_t n, first, h, w, index;  // index: in [N, H, W]
  bool inside;

  __device__ LanePixel(const SoftmaxBwd& a, int64_t tiles, int teams, int team, int lane) {
    const unsigned image = blockIdx.x / (unsigned)tiles;  // a grid has less than 2^31 blocks
    n = image, first = ((int64_t)(blockIdx.x - image * (unsigned)tiles) * teams + team) * kLanes;
    const int64_t r = (first + lane) / a.W;
    w = first + lane - r * a.W, h = a.strip.row0 + r, index = (n * a.H + h) * a.W + w;
    inside = r < a.strip.rows && h >= 0 && h < a.H;
  }
  __device__ int64_t in(const Strides& s) const { return n * s.n + h * s.h + w * s.w; }
};

// The sum of the class weights, the same in every lane.
__device__ inline float class_weight_sum(const CrossEntropy& ce, int64_t C, int lane) {
  if (!ce.class_weight || ce.label_smoothing == 0.0f) return (float)C;
  double sum = 0.0;
  for (int64_t c = lane; c < C; c += kLanes) sum += (double)ce.class_weight[c];
  for (int o = kLanes / 2; o > 0; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
  return (float)sum;
}

// X: of x and dx; D: of dy.
template <class X, class D, LogitsForm kForm>
class Logits {
 public:
  __device__ Logits(const SoftmaxBwd& a, const LogitsWork& work, unsigned char* shared)
      : a_(a),
        work_(work),
        teams_((int)blockDim.x / kLanes >> work.log2_warps),
        index_(threadIdx.x / kLanes >> work.log2_warps),
        team_{(int)threadIdx.x / kLanes - (index_ << work.log2_warps), work.log2_warps,
              (int)threadIdx.x % kLanes},
        dy_(shared + index_ * work.team_bytes, work.chunk),
        x_(shared + index_ * work.team_bytes + work.dy_bytes, work.chunk),
        slots_((LogitsSums*)(shared + teams_ * work.team_bytes) +
               (index_ << work.log2_warps) * kLanes + team_.lane),
        pixel_(a, work.tiles, teams_, index_, team_.lane),
        pixels_((int)min((int64_t)kLanes, a.strip.rows * a.W - pixel_.first)),
        dy_from_((const D*)a.dy + pixel_.n * a.dy_image_stride + pixel_.first * a.c_pad),
        x_at_(pixel_.in(a.x_strides)),
        dx_at_(pixel_.in(a.dx_strides)),
        dense_(!kCe || a.dy),
        softmax_(kForm == LogitsForm::kSoftmax ||
                 (kCe && a.dy && a.activation == Activation::kSoftmax)),
        own_p_(kCe && a.ce.labels && !(a.dy && !a.ce.own_lse)),
        keep_(dense_ && pixel_.inside && (!a.valid.flags || a.valid.flags[pixel_.index])),
        rate_(a.inv_t * kLog2E),
        scale_(dense_ ? a.scale[pixel_.n] : 0.0f) {
    if (a.valid.weights && keep_) {
      scale_ *= a.valid.weights[pixel_.index];
      keep_ = a.valid.weights[pixel_.index] > 0.0f;
    }
    if (softmax_ && pixel_.inside) lse_ = a.lse[pixel_.index];
    if (own_p_ && pixel_.inside) ce_lse_ = a.ce_lse[pixel_.index];
  }

  // The sums, if any, over the chunks, then the gradient from the last chunk, which is still there,
  // to the first.
  __device__ void run() {
    const bool summed = softmax_ || own_p_;
    const int chunks = work_.chunks, first = summed ? 0 : chunks;
#pragma unroll 1
    for (int step = first; step < 2 * chunks; ++step) {
      const int i = step < chunks ? step : 2 * chunks - 1 - step;
      if (step > first && step != chunks) __syncthreads();
      if (step != chunks || !summed) fetch(i);
      if (step < chunks) {
        add(i);
        continue;
      }
      if (step == chunks) prepare(summed);
      write(i);
    }
  }

 private:
  static constexpr bool kPlanes = kForm != LogitsForm::kAny;
  static constexpr bool kCe = kForm == LogitsForm::kCrossEntropy || kForm == LogitsForm::kAny;

  // Of chunk i: the warp's first class, the number of classes.
  __device__ int64_t first(int i) const { return (int64_t)i * work_.chunk + team_.warp * kUnit; }
  __device__ int length(int i) const { return min(work_.chunk, (int)a_.C - i * work_.chunk); }
  // Of pixel p of the team.
  __device__ int64_t offset(int64_t of_lane, int p) const {
    return __shfl_sync(~0u, pixel_.inside ? of_lane : -1, p);
  }

  __device__ __forceinline__ void fetch(int i) {
    const int64_t c0 = (int64_t)i * work_.chunk;
    if (dense_) {
      const D* dy = dy_from_ + c0;
      if (work_.dy_aligned) {
        team_.copy_pieces(dy_, length(i), dy, a_.c_pad, pixels_);
      } else {
        team_.copy_in(dy_, length(i),
                      [&](int p) { return p < pixels_ ? dy + p * a_.c_pad : nullptr; });
      }
    }
    if (!kPlanes && !work_.x_planes) {
      team_.copy_in(x_, length(i), [&](int p) -> const X* {
        const int64_t at = offset(x_at_, p);
        return at < 0 ? nullptr : (const X*)a_.x + at + c0;
      });
    }
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
  }

  // f(c, count, x, dy): of channels [c, c + 8) of the lane's pixel, of which `count` are there.
  template <class F>
  __device__ __forceinline__ void each_unit(int i, const F& f) {
    const int channels = length(i), step = kUnit << work_.log2_warps;
    const X* from = (const X*)a_.x + x_at_ + first(i) * a_.x_strides.c;
#pragma unroll 1
    for (int c = team_.warp * kUnit; c < channels; c += step, from += step * a_.x_strides.c) {
      const int count = pixel_.inside ? channels - c : 0;
      float x[kUnit], dy[kUnit];
      if (kPlanes || work_.x_planes) {
        const X* plane = from;
#pragma unroll
        for (int e = 0; e < kUnit; ++e, plane += a_.x_strides.c) {
          if (e < count) x[e] = widen(*plane);
        }
      } else {
        x_.read(team_.lane, c, x);
      }
      if (dense_) dy_.read(team_.lane, c, dy);
      f(c, count, x, dy);
    }
  }

  __device__ __forceinline__ void add(int i) {
    each_unit(i, [&](int, int count, const float (&x)[kUnit], const float (&dy)[kUnit]) {
      __syncwarp();  // every load is on its way before the first is waited for
#pragma unroll
      for (int e = 0; e < kUnit; ++e) {
        if (softmax_) {
          const float y = exponential(x[e], lse_, rate_);
          if (e < count) sums_.add(y, dy[e]);
        }
        if (own_p_) {
          const float p = exponential(x[e], ce_lse_);
          if (e < count) sums_.p += p;
        }
      }
    });
  }

  // What the gradient needs of all channels: the sums over the team's warps, in order.
  __device__ __forceinline__ void prepare(bool summed) {
    if (summed) {
      slots_[team_.warp * kLanes] = sums_;
      __syncthreads();
      sums_ = {};
#pragma unroll 1
      for (int k = 0; k < 1 << work_.log2_warps; ++k) {
        const LogitsSums& one = slots_[k * kLanes];
        sums_.y += one.y, sums_.y_dy += one.y_dy, sums_.p += one.p;
      }
      sums_.y = 1.0f / sums_.y, sums_.y_dy *= sums_.y;
      if (kForm == LogitsForm::kSoftmax) sums_.y *= scale_;
    }
    if (kCe && a_.ce.labels) {
      sums_.p = 1.0f / sums_.p;
      const float weights = class_weight_sum(a_.ce, a_.C, team_.lane);
      if (pixel_.inside) cross_entropy_ = {a_, pixel_.n, pixel_.index, weights};
    }
  }

  __device__ __forceinline__ void write(int i) {
    const ActivationGradient activation =
        kForm == LogitsForm::kSoftmax ? ActivationGradient{Activation::kSoftmax, a_.inv_t, 1.0f}
                                      : ActivationGradient{a_.activation, a_.inv_t, scale_};
    X* to = (X*)a_.dx + dx_at_ + first(i) * a_.dx_strides.c;
    each_unit(i, [&](int c, int count, float (&x)[kUnit], const float (&dy)[kUnit]) {
      float g[kUnit];
#pragma unroll
      for (int e = 0; e < kUnit; ++e) {
        const float y = softmax_ ? exponential(x[e], lse_, rate_) * sums_.y : 0.0f;
        g[e] = activation.at(x[e], y, sums_.y_dy, dy[e]);
        if (!keep_) g[e] = 0.0f;
        if (kCe && a_.ce.labels) {
          const float p = own_p_ ? exponential(x[e], ce_lse_) * sums_.p : y;
          if (e < count) g[e] += cross_entropy_.at(a_.ce, p, i * work_.chunk + c + e);
        }
      }
      if (kPlanes || work_.dx_planes) {
        put(to, count, g);
        to += (kUnit << work_.log2_warps) * a_.dx_strides.c;
      } else {
        x_.write(team_.lane, c, g);
      }
    });
    if (kPlanes || work_.dx_planes) return;
    __syncthreads();
    team_.copy_out(x_, length(i), [&](int p) -> X* {
      const int64_t at = offset(dx_at_, p);
      return at < 0 ? nullptr : (X*)a_.dx + at + (int64_t)i * work_.chunk;
    });
  }

  __device__ __forceinline__ void put(X* plane, int count, const float (&g)[kUnit]) {
#pragma unroll
    for (int e = 0; e < kUnit; ++e, plane += a_.dx_strides.c) {
      if (e < count) *plane = narrow<X>(g[e]);
    }
  }

  const SoftmaxBwd& a_;
  const LogitsWork& work_;
  int teams_, index_;
  Team team_;
  ChannelTile<D> dy_;
  ChannelTile<X> x_;  // then of dx
  LogitsSums* slots_;
  LanePixel pixel_;
  int pixels_;  // of the team
  const D* dy_from_;
  int64_t x_at_, dx_at_;
  bool dense_, softmax_, own_p_, keep_;
  float rate_, scale_, lse_ = 0.0f, ce_lse_ = 0.0f;
  LogitsSums sums_ =
      {};  // for `write` sum y dy / sum y, 1 / sum y (kSoftmax: the scale over it), 1 / sum p
  CrossEntropyGradient<int> cross_entropy_;
};

template <class X, class D, LogitsForm kForm>
__global__ void __launch_bounds__(kMostWarps* kLanes, kForm < LogitsForm::kCrossEntropy ? 3 : 2)
    softmax_bwd_kernel(const SoftmaxBwd a, const LogitsWork work) {
  DYN_SMEM(shared);
  Logits<X, D, kForm>(a, work, shared).run();
}

}  // namespace gpl_fast::cuda
