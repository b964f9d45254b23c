// The logits' gradient where it is a block's dx: what a thread has of its pixel.
//
// Opt-in: runs where a measured row (conv_block_bwd.cu) gives the first layer to the kernel and the
// network has neither an adapter nor a normalisation before it.
#pragma once

#include "../logits_gradient.cuh"

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

class LogitsPixel {
 public:
  // weights: the sum of all class weights
  __device__ LogitsPixel(const SoftmaxBwd& a, int n, int h, int w, bool inside, float weights)
      : a_(a), inside_(inside) {
    if (!inside) return;
    const int64_t at = ((int64_t)n * a.H + h) * a.W + w;
    x_ = n * a.x_strides.n + h * a.x_strides.h + w * a.x_strides.w;
    dx_ = n * a.dx_strides.n + h * a.dx_strides.h + w * a.dx_strides.w;
    const float weight = weight_of(a.valid, at);
    valid_ = weight > 0.0f;
    activation_ = {a.activation, a.inv_t, a.scale[n] * weight};
    lse_ = a.activation == Activation::kSoftmax ? a.lse[at] : 0.0f;
    if (!a.ce.labels) return;
    cross_entropy_ = {a, n, at, weights};
    ce_lse_ = a.ce_lse[at];
  }

  __device__ bool inside() const { return inside_; }

  __device__ void add(LogitsSums& sums, int c, float dy) const {
    const float x = this->x(c);
    if (softmax()) sums.add(exponential(x, lse_, activation_.inv_t * kLog2E), dy);
    if (counts() && a_.ce.own_lse) sums.p += exponential(x, ce_lse_);
  }

  // Writes class c of the gradient.
  __device__ void finish(const LogitsSums& sums, int c, float dy) const {
    const float x = this->x(c);
    const float y = softmax() ? exponential(x, lse_, activation_.inv_t * kLog2E) / sums.y : 0.0f;
    float g = activation_.at(x, y, sums.y_dy / sums.y, dy);
    if (!valid_) g = 0.0f;
    if (counts()) {
      const float p = a_.ce.own_lse ? exponential(x, ce_lse_) / sums.p : y;
      g += cross_entropy_.at(a_.ce, p, c);
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
  __device__ bool softmax() const { return a_.activation == Activation::kSoftmax; }
  __device__ bool counts() const { return cross_entropy_.label >= 0; }

  const SoftmaxBwd& a_;
  bool inside_, valid_ = false;
  int64_t x_ = 0, dx_ = 0;
  float lse_ = 0.0f, ce_lse_ = 0.0f;
  ActivationGradient activation_ = {};
  CrossEntropyGradient<int> cross_entropy_;
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
