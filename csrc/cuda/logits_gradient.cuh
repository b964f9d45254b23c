// The gradient of a pixel's logits, class by class: eq. (5) from dy, the gradient of their
// activation, and the cross-entropy's. How a pixel's sums come about is each kernel's own.
#pragma once

#include "element.cuh"

namespace gpl_fast::cuda {

constexpr float kLog2E = 1.44269504f;

// e^((x - lse) / T), rate = log2(e) / T: softmax's value but for the rounding of lse, which is
// absolute and so not small for large logits. Divided by its sum over the classes, which is near 1,
// it is free of that.
__device__ __forceinline__ float exponential(float x, float lse, float rate = kLog2E) {
  return exp2_approx((x - lse) * rate);
}

// Over the classes of a pixel: of y, the activation's exponentials, and p, the cross-entropy's.
struct LogitsSums {
  float y_dy, y, p;

  __device__ __forceinline__ void add(float value, float dy) {
    y += value;
    y_dy = fmaf(value, dy, y_dy);
  }
};

struct ActivationGradient {
  Activation activation;
  float inv_t, scale;

  // Softmax: scale y (dy - sum y dy) / T; y and the sum, y_dy, are read by it alone.            (5)
  __device__ __forceinline__ float at(float x, float y, float y_dy, float dy) const {
    float g;
    if (activation == Activation::kSoftmax) {
      g = scale * y * (dy - y_dy);
    } else if (activation == Activation::kSigmoid) {
      const float e = exp2_approx(-fabsf(x) * (inv_t * kLog2E)), y_smaller = e / (1.0f + e);
      g = scale * dy * (y_smaller / (1.0f + e));  // 1 - y would cancel
    } else {
      g = scale * dy;
    }
    return g * inv_t;  // last: it may be huge where the rest is 0
  }
};

// The weight of the pixel at a place of [N, H, W], 0 where it does not count.
__device__ __forceinline__ float weight_of(const Valid& valid, int64_t at) {
  if (valid.weights) return valid.weights[at] > 0.0f ? valid.weights[at] : 0.0f;
  return !valid.flags || valid.flags[at] ? 1.0f : 0.0f;
}

__device__ __forceinline__ float class_weight(const CrossEntropy& ce, int64_t c) {
  return ce.class_weight ? ce.class_weight[c] : 1.0f;
}

// s (p_c (w_t (1 - e) + e/C sum w) - e/C w_c) - [c = t] s (1 - e) w_t
template <class Index>  // of classes
struct CrossEntropyGradient {
  Index label = -1;  // -1 where the pixel is not counted
  float on_p = 0.0f, on_weight = 0.0f, on_label = 0.0f;

  CrossEntropyGradient() = default;
  // px: of [N, H, W]; weights: the sum of all class weights
  __device__ __forceinline__ CrossEntropyGradient(const SoftmaxBwd& a, int64_t n, int64_t px,
                                                  float weights) {
    const int64_t t = a.ce.labels[px];
    label = t < 0 || t >= a.C ? -1 : (Index)t;
    const float e = a.ce.label_smoothing, s = a.ce_scale[n] * (a.ce.mask ? a.ce.mask[px] : 1.0f);
    const float w = label < 0 ? 0.0f : class_weight(a.ce, label);
    on_p = s * fmaf(w, 1.0f - e, e / (float)a.C * weights);
    on_weight = s * e / (float)a.C;
    on_label = s * (1.0f - e) * w;
  }

  __device__ __forceinline__ float at(const CrossEntropy& ce, float p, Index c) const {
    if (label < 0) return 0.0f;
    const float g = p * on_p - on_weight * class_weight(ce, c);
    return c == label ? g - on_label : g;
  }
};

}  // namespace gpl_fast::cuda
