// Eq. (5) and the cross-entropy's gradient where a block's dx is the gradient of a map of logits: a
// thread's pixel and its sums.
#pragma once

#include "element.cuh"

namespace gpl_fast::cuda {

__device__ __forceinline__ float read_element(const void* p, DType dtype, int64_t i) {
  if (dtype == DType::kFloat32) return ((const float*)p)[i];
  if (dtype == DType::kBFloat16) return widen(((const __nv_bfloat16*)p)[i]);
  return widen(((const __half*)p)[i]);
}

// The value as stored.
__device__ __forceinline__ float write_element(void* p, DType dtype, int64_t i, float x) {
  if (dtype == DType::kFloat32) return ((float*)p)[i] = x;
  if (dtype == DType::kBFloat16) {
    return widen(((__nv_bfloat16*)p)[i] = narrow<__nv_bfloat16>(x));
  }
  return widen(((__half*)p)[i] = narrow<__half>(x));
}

// Sums over the channels of a pixel; y and p as computed again, so near 1.
struct LogitsSums {
  float y_dy, y, p;
};

class LogitsPixel {
 public:
  // weights: the sum of all class weights
  __device__ LogitsPixel(const SoftmaxBwd& a, int n, int h, int w, bool inside, float weights)
      : a_(a), inside_(inside) {
    if (!inside) return;
    const int64_t at = ((int64_t)n * a.H + h) * a.W + w;
    x_ = n * a.x_strides.n + h * a.x_strides.h + w * a.x_strides.w;
    dx_ = n * a.dx_strides.n + h * a.dx_strides.h + w * a.dx_strides.w;
    inv_t_ = a.inv_t;
    lse_ = a.activation == Activation::kSoftmax ? a.lse[at] : 0.0f;
    scale_ = a.scale[n];
    keep_ = !a.valid || a.valid[at];
    const int64_t label = a.ce.labels ? a.ce.labels[at] : -1;
    if (label < 0 || label >= a.C) return;
    // s (p_c (w_t (1 - e) + e/C sum w) - e/C w_c) - [c = t] s (1 - e) w_t
    label_ = (int)label;
    const float weight = a.ce.class_weight ? a.ce.class_weight[label] : 1.0f;
    const float s = a.ce_scale[n], e = a.ce.label_smoothing;
    ce_lse_ = a.ce_lse[at];
    on_p_ = s * (weight * (1.0f - e) + e / (float)a.C * weights);
    on_weight_ = s * e / (float)a.C;
    on_label_ = s * (1.0f - e) * weight;
  }

  __device__ bool inside() const { return inside_; }

  __device__ void add(LogitsSums& sums, int c, float dy) const {
    const float x = this->x(c);
    if (a_.activation == Activation::kSoftmax) {
      const float y = expf((x - lse_) * inv_t_);
      sums.y += y;
      sums.y_dy = fmaf(y, dy, sums.y_dy);
    }
    if (label_ >= 0 && a_.ce.own_lse) sums.p += expf(x - ce_lse_);
  }

  // Writes channel c of the gradient.                                                        (5)
  __device__ void finish(const LogitsSums& sums, int c, float dy) const {
    const float x = this->x(c);
    float y = 0.0f, g = scale_ * dy;
    if (a_.activation == Activation::kSoftmax) {
      // The sum of the y is 1 up to the rounding of lse: dividing by it removes that.
      y = expf((x - lse_) * inv_t_) / sums.y;
      g = scale_ * y * (dy - sums.y_dy / sums.y);
    } else if (a_.activation == Activation::kSigmoid) {
      y = sigmoid(x * inv_t_);
      g *= y * sigmoid(-x * inv_t_);  // 1 - y without its cancellation
    }
    g *= inv_t_;  // last: it may be huge where the rest is 0
    if (!keep_) g = 0.0f;
    if (label_ >= 0) {
      const float p = a_.ce.own_lse ? expf(x - ce_lse_) / sums.p : y;
      const float weight = a_.ce.class_weight ? a_.ce.class_weight[c] : 1.0f;
      g += p * on_p_ - on_weight_ * weight - (c == label_ ? on_label_ : 0.0f);
    }
    write_element(a_.dx, a_.x_dtype, dx_ + c * a_.dx_strides.c, g);
  }

  // dy' waits in the gradient's own memory for its sums; returned as it will be read.
  __device__ float put_dy(int c, float dy) const {
    return write_element(a_.dx, a_.x_dtype, dx_ + c * a_.dx_strides.c, dy);
  }
  __device__ float take_dy(int c) const {
    return read_element(a_.dx, a_.x_dtype, dx_ + c * a_.dx_strides.c);
  }

 private:
  __device__ float x(int c) const {
    return read_element(a_.x, a_.x_dtype, x_ + c * a_.x_strides.c);
  }

  const SoftmaxBwd& a_;
  bool inside_, keep_ = false;
  int label_ = -1;
  int64_t x_ = 0, dx_ = 0;
  float inv_t_ = 0, lse_ = 0, ce_lse_ = 0, scale_ = 0, on_p_ = 0, on_weight_ = 0, on_label_ = 0;
};

__device__ __forceinline__ bool needs_sums(const SoftmaxBwd& a) {
  return a.activation == Activation::kSoftmax || a.ce.labels;
}

// The sum of all class weights, the same in every thread.
__device__ __forceinline__ float class_weights(const SoftmaxBwd& a, float* shared) {
  if (!a.ce.labels || !a.ce.class_weight) return (float)a.C;
  if (threadIdx.x < 32) {
    float sum = 0.0f;
    for (int64_t c = threadIdx.x; c < a.C; c += 32) sum += a.ce.class_weight[c];
    for (int o = 16; o > 0; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
    if (threadIdx.x == 0) *shared = sum;
  }
  __syncthreads();
  return *shared;
}

}  // namespace gpl_fast::cuda
