// Logits -> the maps the net sees, NHWC: the prediction and its difference to the target, and from
// the same pass what the softmax's backward and the cross-entropy need.
#include "activation.h"
#include "elements.h"

namespace gpl_fast {
namespace GPL_CPU_NAMESPACE {
namespace {

// Up to 16 neighbouring pixels of a row.
struct Pixels {
  int64_t image, at, n;  // at: the first one's place in an [N, H, W] tensor
  bool core;
};

// The target's map from its listed classes, [C][16].
void topk_target(const SoftmaxPackFwd& a, const Pixels& px, float* t) {
  const int64_t plane = a.topk_stride;
  const int64_t first = px.image * (a.topk_image_stride - a.H * a.W) + px.at;
  Vf rest = a.topk_rest ? load_upto(a.topk_rest + px.at, px.n) : fill(0.0f);
  for (int64_t c = 0; c < a.C; ++c) store(t + c * 16, rest);
  // Listed classes start from zero before any value arrives: a class listed twice adds up.
  for (int add = 0; add < 2; ++add) {
    for (int64_t j = 0; j < a.k; ++j) {
      for (int64_t p = 0; p < px.n; ++p) {
        int64_t c = a.topk_indices[first + j * plane + p];
        if (c < 0 || c >= a.C) continue;
        t[c * 16 + p] = add ? t[c * 16 + p] + a.topk_values[first + j * plane + p] : 0.0f;
      }
    }
  }
}

// The cross-entropy of 16 pixels, in two steps: what it needs of x, and the loss once lse is known.
class PixelLoss {
 public:
  PixelLoss() = default;
  PixelLoss(const CrossEntropy& ce, const Pixels& px, const float* x, int64_t C, float weights)
      : n_(px.n), ce_(label_weights(ce, px.at, px.n, C)), keep_(1.0f - ce.label_smoothing) {
    float xt[16] = {};
    for (int64_t p = 0; p < n_; ++p) {
      if (ce_.label[p] >= 0) xt[p] = x[(int64_t)ce_.label[p] * 16 + p];
    }
    x_label_ = load(xt);
    if (ce.label_smoothing == 0.0f) return;
    const float smooth = ce.label_smoothing / (float)C;
    const Vf shift = channel_max(x, C);
    weights_ = smooth * weights;
    for (int64_t c = 0; c < C; ++c) {
      float w = ce.class_weight ? ce.class_weight[c] : 1.0f;
      below_ = fma(fill(smooth * w), shift - load(x + c * 16), below_);
    }
  }

  // Adds to the row's {loss, weight}, pixel by pixel in order.
  void add(const LogSumExp& lse, double* sums) const {
    // w_t (1 - e) (lse - x_t) + e/C sum_c w_c (lse - x_c)
    Vf loss = load(ce_.weight) * fill(keep_) * ((lse.shift - x_label_) + lse.log_sum);
    loss = loss + fma(fill(weights_), lse.log_sum, below_);
    float each[16], weight[16];
    store(each, loss * ce_.mask);
    store(weight, load(ce_.weight) * ce_.mask);
    for (int64_t p = 0; p < n_; ++p) {
      if (ce_.label[p] < 0) continue;
      sums[0] += (double)each[p];
      sums[1] += (double)weight[p];
    }
  }

 private:
  int64_t n_ = 0;
  LabelWeights ce_;
  float keep_ = 1.0f, weights_ = 0.0f;  // weights_: e/C sum_c w_c
  Vf x_label_, below_ = fill(0.0f);     // below_: e/C sum_c w_c (max - x_c)
};

// x * fx and t * ft are the two maps: leaves one of them in x and the difference in t.         (6)
// elements: their labels, [C][16], or null.
void dense_difference(const SoftmaxPackFwd& a, const Pixels& px, Vi keep, float* x, Vf fx, float* t,
                      Vf ft, const float* elements) {
  const Vf zero = fill(0.0f);
  const bool from_target = a.from_target[px.image];
  if (elements) {
    for (int64_t c = 0; c < a.C; ++c) {
      const Vi there = counts(load(elements + c * 16));
      store(x + c * 16, select(there, load(x + c * 16), zero));
      store(t + c * 16, select(there, load(t + c * 16), zero));
    }
  }
  for (int64_t c = 0; c < a.C; ++c) {
    const Vf y = load(x + c * 16) * fx, target = load(t + c * 16) * ft;
    store(x + c * 16, select(keep, from_target ? target : y, zero));
    store(t + c * 16, select(keep, y - target, zero));
  }
}

void prediction(const SoftmaxPackFwd& a, Vi keep, float* x, Vf fx) {
  for (int64_t c = 0; c < a.C; ++c) {
    store(x + c * 16, select(keep, load(x + c * 16) * fx, fill(0.0f)));
  }
}

// 1 - y' of the labels of 16 pixels, from the logits x; false: not of this activation.
bool label_complement(const SoftmaxPackFwd& a, const Pixels& px, const float* x,
                      float* complement) {
  return squashing(a.activation, [&](auto act) {
    float x_label[16] = {};
    for (int64_t p = 0; p < px.n; ++p) {
      const int64_t label = a.labels[px.at + p];
      if (label >= 0 && label < a.C) x_label[p] = x[label * 16 + p];
    }
    store(complement, act.complement(load(x_label) * fill(a.inv_t)));
  });
}

// x less the target's one-hot map where that leaves less of it: where y'_label > 1/2. complement:
// 1 - y' of the labels, or null.
void take_labels(const SoftmaxPackFwd& a, const Pixels& px, float* x, const float* complement,
                 uint8_t* taken) {
  for (int64_t p = 0; p < px.n; ++p) {
    const int64_t label = a.labels[px.at + p];
    taken[p] = counts(a.valid, px.at + p) && label >= 0 && label < a.C && x[label * 16 + p] > 0.5f;
    if (!taken[p]) continue;
    float& y = x[label * 16 + p];
    y = complement ? -complement[p] : y - 1.0f;
  }
}

// x less t where that leaves less of it: where |x - t|^2 < |x|^2.
void take_topk(const SoftmaxPackFwd& a, const Pixels& px, Vi keep, float* x, const float* t,
               uint8_t* taken) {
  Vf gain = fill(0.0f);
  for (int64_t c = 0; c < a.C; ++c) {
    const Vf y = load(x + c * 16), target = load(t + c * 16);
    gain = fma(target, (y - target) + y, gain);
  }
  const Vi take = select(keep, gain > fill(0.0f), fill_i(0));
  for (int64_t c = 0; c < a.C; ++c) {
    const Vf y = load(x + c * 16);
    store(x + c * 16, select(take, y - load(t + c * 16), y));
  }
  int32_t lanes[16];
  store_i(lanes, take);
  for (int64_t p = 0; p < px.n; ++p) taken[p] = lanes[p] != 0;
}

void weigh(const SoftmaxPackFwd& a, const Pixels& px, float* map) {
  const Vf m = weight_lanes(a.valid.weights, px.at, px.n);
  for (int64_t c = 0; c < a.C; ++c) store(map + c * 16, load(map + c * 16) * m);
}

// From the loaded logits of x and of a dense target, both [C][16], to the maps, in place; they have
// no weights yet.
void maps(const SoftmaxPackFwd& a, const Pixels& px, float* x, float* t, const float* elements,
          Lines& x_lines, Lines& t_lines, uint8_t* taken, float weights, double* ce_sums) {
  const bool has_ce = px.core && a.ce.labels;
  if (has_ce && a.ce.own_lse) {
    LogSumExp lse = log_sum_exp(x, a.C);
    if (a.ce_lse) store_upto(a.ce_lse + px.at, lse.value(1.0f), px.n);
    PixelLoss(a.ce, px, x, a.C, weights).add(lse, ce_sums);
  }
  PixelLoss loss;
  const bool shared = has_ce && !a.ce.own_lse;
  if (shared) loss = PixelLoss(a.ce, px, x, a.C, weights);
  float complement[16];
  const bool squashed = a.y && a.labels && label_complement(a, px, x, complement);
  const Activated yp = activate(a.activation, x, a.C, a.inv_t, x_lines);
  if (shared) loss.add(yp.lse, ce_sums);
  if (px.core && a.lse) store_upto(a.lse + px.at, yp.lse.value(a.lse_t), px.n);
  if (!a.y) return;
  const Vi keep = valid_lanes(a.valid, px.at, px.n);
  if (a.target) {
    const Vf factor = activate(a.target_activation, t, a.C, a.target_inv_t, t_lines).factor;
    return dense_difference(a, px, keep, x, yp.factor, t, factor, elements);
  }
  prediction(a, keep, x, yp.factor);
  if (a.labels) take_labels(a, px, x, squashed ? complement : nullptr, taken);
  if (a.topk_values) {
    topk_target(a, px, t);
    take_topk(a, px, keep, x, t, taken);
  }
}

// Where the tile goes in an output map, null where there is none.
char* map_address(const SoftmaxPackFwd& a, void* map, int64_t image_stride, const Place& p) {
  if (!map) return nullptr;
  return (char*)map + (p.n * image_stride + (p.r * a.W + p.w) * a.c_pad) * element_size(a.dtype);
}

// One group of up to 16 pixels, [C][16], to its place.
void store_map(const SoftmaxPackFwd& a, char* map, const float* group, int64_t pixels) {
  with_dtype(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    if (a.c_pad == 1) {
      store_upto((T*)map, load(group), pixels);
    } else {
      store_channels((T*)map, a.c_pad, a.c_pad, group, pixels);
    }
  });
}

// A dense target's tile; of labels the map that they are.
void load_target(float* t, const Tiling& tiling, const SoftmaxPackFwd& a, const Place& at) {
  if (a.target_dtype != DType::kLabels) {
    return load_image(t, tiling, a.target, a.target_dtype, a.target_strides, a.C, at);
  }
  load_elements(t, tiling, a.target, a.target_strides, a.C, at);
  for (int64_t p = 0; p < at.pixels; p += 16) {
    float* group = t + p / 16 * tiling.group;
    for (int64_t c = 0; c < a.C; ++c) store(group + c * 16, is_one(load(group + c * 16)));
  }
}

void rows_fwd(const SoftmaxPackFwd& a, const Tiling& tiling, float weights, Items& rows) {
  Scratch x_tile(tiling.floats()), t_tile(a.target || a.topk_values ? tiling.floats() : 0);
  Scratch elements_tile(a.elements ? tiling.floats() : 0);
  float *x = x_tile.get(), *t = t_tile.get(), *e = a.elements ? elements_tile.get() : nullptr;
  Lines x_lines, t_lines;
  const int64_t pixel_bytes = a.c_pad * element_size(a.dtype);
  double ce_sums[2] = {0.0, 0.0};
  for (Walk walk(a.strip, a.H, a.W, tiling, rows); !walk.done();) {
    const Place at = walk.here();
    char* delta = map_address(a, a.delta, a.delta_image_stride, at);
    char* y = map_address(a, a.y, a.y_image_stride, at);
    uint8_t* taken = a.taken ? a.taken + (at.n * a.strip.rows + at.r) * a.W + at.w : nullptr;
    if (!at.inside) {
      if (taken) std::memset(taken, 0, (size_t)a.W);
      if (delta) std::memset(delta, 0, (size_t)(a.W * pixel_bytes));
      if (y) std::memset(y, 0, (size_t)(a.W * pixel_bytes));
      walk.skip_row();
      continue;
    }
    walk.advance();
    load_image(x, tiling, a.x, a.x_dtype, a.x_strides, a.C, at);
    if (a.target) load_target(t, tiling, a, at);
    if (e) load_elements(e, tiling, a.elements, a.elements_strides, a.C, at);
    const bool core = at.h >= a.core.row0 && at.h < a.core.row0 + a.core.rows;
    if (at.w == 0) ce_sums[0] = ce_sums[1] = 0.0;
    for (int64_t p = 0; p < at.pixels; p += 16) {
      const Pixels px = {at.n, (at.n * a.H + at.h) * a.W + at.w + p, min_of(at.pixels - p, 16),
                         core};
      const int64_t group = p / 16 * tiling.group, out = p * pixel_bytes;
      if (y) x_lines.want(y + out, px.n * pixel_bytes);
      if (delta) t_lines.want(delta + out, px.n * pixel_bytes);
      maps(a, px, x + group, t + group, e ? e + group : nullptr, x_lines, t_lines,
           taken ? taken + p : nullptr, weights, ce_sums);
      if (a.valid.weights && y) weigh(a, px, x + group);
      if (a.valid.weights && delta) weigh(a, px, t + group);
      if (y) store_map(a, y + out, x + group, px.n);
      if (delta) store_map(a, delta + out, t + group, px.n);
    }
    if (core && a.ce.labels) {
      double* sums = a.ce_rows + (at.n * a.H + at.h) * 2;
      sums[0] = ce_sums[0], sums[1] = ce_sums[1];
    }
  }
}

}  // namespace

void softmax_pack_fwd(const SoftmaxPackFwd& a) {
  const Tiling tiling(a.W, max_of(a.C, a.c_pad));
  const float weights = a.ce.labels ? class_weight_sum(a.ce, a.C) : 0.0f;
  share(a.N * a.strip.rows, a.W * a.C, [&](Items& rows) { rows_fwd(a, tiling, weights, rows); });
}

}  // namespace GPL_CPU_NAMESPACE
}  // namespace gpl_fast
