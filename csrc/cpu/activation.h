// What the softmax's forward and backward share, for one group of 16 pixels x C channels, [C][16].
#pragma once

#include "walk.h"

namespace gpl_fast {
namespace GPL_CPU_NAMESPACE {

GPL_INLINE Vf channel_max(const float* x, int64_t C) {
  Vf a = load(x), b = a;
  int64_t c = 1;
  for (; c + 1 < C; c += 2) {
    a = larger(a, load(x + c * 16));
    b = larger(b, load(x + c * 16 + 16));
  }
  if (c < C) a = larger(a, load(x + c * 16));
  return larger(a, b);
}

// lse = shift + T log_sum, kept apart because lse - x_c of a confident pixel is about the latter
// alone.
struct LogSumExp {
  Vf shift, log_sum;
  Vf value(float t) const { return fma(fill(t), log_sum, shift); }
};

// log sum_c e^(x_c)
inline LogSumExp log_sum_exp(const float* x, int64_t C) {
  Vf shift = channel_max(x, C), sum = fill(0.0f);
  for (int64_t c = 0; c < C; ++c) sum = sum + exp<true>(load(x + c * 16) - shift);
  return {shift, log(sum)};
}

// A squashing activation, of each logit by itself, at x / T: its value, 1 - that, and its slope.
// Of the latter two nothing is left in a rounded value where x is large.
struct Sigmoid {
  static GPL_INLINE Vf value(Vf x) {
    return fill(1.0f) / (fill(1.0f) + exp<false>(fill(0.0f) - x));
  }
  static GPL_INLINE Vf complement(Vf x) { return value(fill(0.0f) - x); }
  static GPL_INLINE Vf slope(Vf x) { return value(x) * complement(x); }
};

// Calls f with the squashing activation that this is; false: it is none.
template <class F>
GPL_INLINE bool squashing(Activation activation, const F& f) {
  if (activation == Activation::kSigmoid) return f(Sigmoid{}), true;
  return false;
}

struct Activated {
  Vf factor;      // the activation is the tile's values times this
  LogSumExp lse;  // softmax only
};

// In place: y' = act(x / T), up to the factor.
inline Activated activate(Activation activation, float* x, int64_t C, float inv_t, Lines& lines) {
  if (activation == Activation::kSoftmax) {
    const Vf shift = channel_max(x, C);
    Vf sum = fill(0.0f);
    each_channel(C, lines, [&](int64_t c) __attribute__((always_inline)) {
      Vf e = exp<true>((load(x + c * 16) - shift) * fill(inv_t));
      sum = sum + e;
      store(x + c * 16, e);
    });
    return {fill(1.0f) / sum, {shift, log(sum)}};
  }
  const bool squashed = squashing(activation, [&](auto act) {
    each_channel(C, lines, [&](int64_t c) __attribute__((always_inline)) {
      store(x + c * 16, act.value(load(x + c * 16) * fill(inv_t)));
    });
  });
  return {fill(squashed ? 1.0f : inv_t), {}};
}

// Which of n pixels count, from place `at` of [N, H, W] on.
GPL_INLINE Vi valid_lanes(const Valid& valid, int64_t at, int64_t n) {
  if (!valid.flags && !valid.weights) return fill_i(-1);
  int32_t lanes[16] = {};
  for (int64_t p = 0; p < n; ++p) lanes[p] = -(int32_t)counts(valid, at + p);
  return load_i(lanes);
}

// Their weights, of a map of weights; 0 where they do not count.
GPL_INLINE Vf weight_lanes(const float* weights, int64_t at, int64_t n) {
  const Vf m = load_upto(weights + at, n);
  return select(m > fill(0.0f), m, fill(0.0f));
}

// The cross-entropy's labels of 16 pixels; -1 and weight 0 where a pixel is not counted.
struct LabelWeights {
  int32_t label[16];
  float weight[16];
  Vf mask;  // weights of the pixels
  Vi counted() const { return load_i(label) > fill_i(-1); }
};

inline LabelWeights label_weights(const CrossEntropy& ce, int64_t at, int64_t n, int64_t C) {
  LabelWeights r;
  for (int64_t p = 0; p < 16; ++p) {
    int64_t label = p < n ? ce.labels[at + p] : -1;
    bool counted = label >= 0 && label < C;
    r.label[p] = counted ? (int32_t)label : -1;
    r.weight[p] = !counted ? 0.0f : ce.class_weight ? ce.class_weight[label] : 1.0f;
  }
  r.mask = ce.mask ? weight_lanes(ce.mask, at, n) : fill(1.0f);
  return r;
}

inline float class_weight_sum(const CrossEntropy& ce, int64_t C) {
  if (!ce.class_weight) return (float)C;
  double sum = 0.0;
  for (int64_t c = 0; c < C; ++c) sum += (double)ce.class_weight[c];
  return (float)sum;
}

}  // namespace GPL_CPU_NAMESPACE
}  // namespace gpl_fast
