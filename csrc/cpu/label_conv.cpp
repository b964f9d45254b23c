// What a target that is a list of classes adds to the first convolution: a sum of table rows, so
// its cost does not depend on the number of classes.
#include "tile.h"

namespace gpl_fast {
namespace GPL_CPU_NAMESPACE {
namespace {

constexpr int32_t kNoClass = -1;  // a zero row: no label, not valid, outside the image
constexpr int32_t kMixed = -2;    // more than one label, or weight, in a column

struct Term {
  const void* row;  // [c_out], of the table (compute dtype) or of the rest's table (float32)
  float weight;
  bool rest;
};

// The rows of the target that y is already less of, and the others.
struct Terms {
  Term *taken, *left;
  int64_t n_taken = 0, n_left = 0;
  void add(bool is_taken, const Term& term) {
    (is_taken ? taken[n_taken++] : left[n_left++]) = term;
  }
};

// sum[0..64) += sign * weight * row, float32 in the order given.
template <class T>
GPL_INLINE void add_rows(Vf* sum, const Term* terms, int64_t count, float sign, int64_t c,
                         int64_t n) {
  for (int64_t i = 0; i < count; ++i) {
    const Vf weight = fill(sign * terms[i].weight);
    for (int64_t k = 0; k < 4 && 16 * k < n; ++k) {
      const int64_t at = c + 16 * k;
      Vf row = terms[i].rest ? load_upto((const float*)terms[i].row + at, n - 16 * k)
                             : load_upto((const T*)terms[i].row + at, n - 16 * k);
      sum[k] = fma(weight, row, sum[k]);
    }
  }
}

// From q in dz, the convolution of y' less the taken rows: z = q + taken rows, or all rows where it
// is the target's; dz = q - the others.
template <class T>
void add_terms(T* z, T* dz, const Terms& terms, bool from_target, int64_t c_out) {
  for (int64_t c = 0; c < c_out; c += 64) {
    const int64_t n = c_out - c;
    Vf plus[4], minus[4];
    for (int64_t k = 0; k < 4 && 16 * k < n; ++k) {
      minus[k] = load_upto(dz + c + 16 * k, n - 16 * k);
      plus[k] = from_target ? fill(0.0f) : minus[k];
    }
    add_rows<T>(plus, terms.taken, terms.n_taken, 1.0f, c, n);
    if (from_target) add_rows<T>(plus, terms.left, terms.n_left, 1.0f, c, n);
    add_rows<T>(minus, terms.left, terms.n_left, -1.0f, c, n);
    for (int64_t k = 0; k < 4 && 16 * k < n; ++k) {
      store_upto(z + c + 16 * k, plus[k], n - 16 * k);
      store_upto(dz + c + 16 * k, minus[k], n - 16 * k);
    }
  }
}

bool is_valid(const LabelConvFwd& a, int64_t n, int64_t h, int64_t w) {
  return h >= 0 && h < a.H && w >= 0 && w < a.W && counts(a.valid, (n * a.H + h) * a.W + w);
}

bool is_taken(const LabelConvFwd& a, int64_t n, int64_t h, int64_t w) {
  return a.taken[(n * a.taken_strip.rows + h - a.taken_strip.row0) * a.W + w] != 0;
}

float weight_at(const LabelConvFwd& a, int64_t n, int64_t h, int64_t w) {
  return a.valid.weights ? a.valid.weights[(n * a.H + h) * a.W + w] : 1.0f;
}

// The K rows around row h, with K / 2 columns on both sides: [K, W + K - 1] each.
struct Around {
  int32_t* label;   // 2 * label + taken
  float* weight;    // of its pixel; null = 1
  int32_t* column;  // [W + K - 1]: the label of all K rows, or kMixed
};

void gather_labels(const LabelConvFwd& a, int64_t n, int64_t h, const Around& around) {
  const int64_t pad = a.K / 2, width = a.W + a.K - 1;
  int32_t* column = around.column;
  for (int64_t i = 0; i < a.K; ++i) {
    for (int64_t j = 0; j < width; ++j) {
      const int64_t y = h + i - pad, x = j - pad;
      int32_t label = kNoClass;
      if (is_valid(a, n, y, x)) {
        int64_t l = a.labels[(n * a.H + y) * a.W + x];
        if (l >= 0 && l < a.C) label = (int32_t)(2 * l) + is_taken(a, n, y, x);
      }
      around.label[i * width + j] = label;
      bool same = i == 0 || column[j] == label;
      if (around.weight) {
        float& weight = around.weight[i * width + j];
        weight = label == kNoClass ? 0.0f : weight_at(a, n, y, x);
        same = same && weight == around.weight[j];
      }
      column[j] = same ? label : kMixed;
    }
  }
}

template <class T>
void label_row(const LabelConvFwd& a, int64_t n, int64_t h, T* z, T* dz, const Around& around,
               Terms terms) {
  const int64_t width = a.W + a.K - 1;
  const bool from_target = a.from_target[n];
  gather_labels(a, n, h, around);
  const int32_t* column = around.column;
  for (int64_t w = 0; w < a.W; ++w, z += a.c_out, dz += a.c_out) {
    int32_t label = column[w];
    for (int64_t j = 1; j < a.K; ++j) label = column[w + j] == label ? label : kMixed;
    const float weight = around.weight ? around.weight[w] : 1.0f;
    for (int64_t j = 1; around.weight && j < a.K; ++j) {
      if (around.weight[w + j] != weight) label = kMixed;
    }
    if (label != kMixed) {
      // kNoClass: no row
      const float* row = label == kNoClass ? nullptr : a.interior + label / 2 * a.c_out;
      for (int64_t c = 0; c < a.c_out; c += 16) {
        const int64_t m = a.c_out - c;
        const Vf q = load_upto(dz + c, m);
        const Vf r = row ? load_upto(row + c, m) * fill(weight) : fill(0.0f);
        const bool taken = label % 2 != 0;
        store_upto(z + c, from_target ? r : taken ? q + r : q, m);
        if (!taken) store_upto(dz + c, q - r, m);
      }
      continue;
    }
    terms.n_taken = terms.n_left = 0;
    for (int64_t i = 0; i < a.K; ++i) {
      for (int64_t j = 0; j < a.K; ++j) {
        const int64_t at = i * width + w + j;
        int32_t l = around.label[at];
        if (l == kNoClass) continue;
        const T* row = (const T*)a.table + ((i * a.K + j) * a.C + l / 2) * a.c_out;
        terms.add(l % 2, {row, around.weight ? around.weight[at] : 1.0f, false});
      }
    }
    add_terms(z, dz, terms, from_target, a.c_out);
  }
}

// Each listed class of the pixel at tap (i, j) as a term; with a rest, the rest's row and what the
// listed classes do not take of it.
template <class T>
void topk_terms(const LabelConvFwd& a, int64_t n, int64_t h, int64_t w, int64_t tap, Terms& terms) {
  const int64_t plane = a.H * a.W, pixel = h * a.W + w;
  const int64_t* indices = a.topk_indices + n * a.k * plane + pixel;
  const float* values = a.topk_values + n * a.k * plane + pixel;
  const float rest = a.topk_rest ? a.topk_rest[n * plane + pixel] : 0.0f;
  const bool taken = is_taken(a, n, h, w);
  const float pixel_weight = weight_at(a, n, h, w);
  for (int64_t j = 0; j < a.k; ++j) {
    const int64_t c = indices[j * plane];
    if (c < 0 || c >= a.C) continue;
    float weight = values[j * plane];
    if (rest != 0.0f) {
      bool first = true;
      for (int64_t i = 0; i < j; ++i) first = first && indices[i * plane] != c;
      if (first) weight -= rest;
    }
    terms.add(taken, {(const T*)a.table + (tap * a.C + c) * a.c_out, weight * pixel_weight, false});
  }
  if (rest != 0.0f) {
    terms.add(taken, {a.rest_table + tap * a.c_out, rest * pixel_weight, true});
  }
}

template <class T>
void topk_row(const LabelConvFwd& a, int64_t n, int64_t h, T* z, T* dz, Terms terms) {
  const int64_t pad = a.K / 2;
  for (int64_t w = 0; w < a.W; ++w, z += a.c_out, dz += a.c_out) {
    terms.n_taken = terms.n_left = 0;
    for (int64_t tap = 0; tap < a.K * a.K; ++tap) {
      const int64_t y = h + tap / a.K - pad, x = w + tap % a.K - pad;
      if (is_valid(a, n, y, x)) topk_terms<T>(a, n, y, x, tap, terms);
    }
    add_terms(z, dz, terms, a.from_target[n] != 0, a.c_out);
  }
}

}  // namespace

void label_conv_fwd(const LabelConvFwd& a) {
  const int64_t most_terms = a.K * a.K * (a.labels ? 1 : a.k + 1);
  parallel(a.N * a.strip.rows, a.W * a.c_out * a.K, [&](int64_t begin, int64_t end) {
    Scratch memory(2 * most_terms * (int64_t)(sizeof(Term) / sizeof(float)));
    const int64_t width = a.W + a.K - 1, window = a.K * width;
    Scratch labels(a.labels ? window + width : 0);
    Scratch weights(a.labels && a.valid.weights ? window : 0);
    int32_t* const label = (int32_t*)labels.get();
    const Around around = {label, a.valid.weights ? weights.get() : nullptr, label + window};
    const Terms terms = {(Term*)memory.get(), (Term*)memory.get() + most_terms};
    with_dtype(a.dtype, [&](auto tag) {
      using T = decltype(tag);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = i / a.strip.rows, r = i % a.strip.rows, h = a.strip.row0 + r;
        T* z = (T*)a.z + n * a.z_image_stride + r * a.W * a.c_out;
        T* dz = (T*)a.dz + n * a.dz_image_stride + r * a.W * a.c_out;
        if (h < 0 || h >= a.H) {
          std::memset(z, 0, (size_t)(a.W * a.c_out) * sizeof(T));
          std::memset(dz, 0, (size_t)(a.W * a.c_out) * sizeof(T));
        } else if (a.labels) {
          label_row(a, n, h, z, dz, around, terms);
        } else {
          topk_row(a, n, h, z, dz, terms);
        }
      }
    });
  });
}

}  // namespace GPL_CPU_NAMESPACE
}  // namespace gpl_fast
