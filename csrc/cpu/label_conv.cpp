// The first convolution of a target that is a list of classes: a sum of table rows, so its cost
// does not depend on the number of classes.
#include "tile.h"

namespace gpl_fast {
namespace GPL_CPU_NAMESPACE {
namespace {

constexpr int32_t kNoClass = -1;  // a zero row: no label, not valid, outside the image
constexpr int32_t kMixed = -2;    // more than one label in a column of the neighbourhood

struct Term {
  const void* row;  // [c_out], of the table (compute dtype) or of the rest's table (float32)
  float weight;
  bool rest;
};

// z[0..c_out) = sum of weight * row, float32 in the order given.
template <class T>
void sum_rows(T* z, const Term* terms, int64_t count, int64_t c_out) {
  for (int64_t c = 0; c < c_out; c += 64) {
    Vf sum[4] = {fill(0.0f), fill(0.0f), fill(0.0f), fill(0.0f)};
    const int64_t n = c_out - c;
    for (int64_t i = 0; i < count; ++i) {
      const Vf weight = fill(terms[i].weight);
      for (int64_t k = 0; k < 4 && 16 * k < n; ++k) {
        const int64_t at = c + 16 * k;
        Vf row = terms[i].rest ? load_upto((const float*)terms[i].row + at, n - 16 * k)
                               : load_upto((const T*)terms[i].row + at, n - 16 * k);
        sum[k] = fma(weight, row, sum[k]);
      }
    }
    for (int64_t k = 0; k < 4 && 16 * k < n; ++k) store_upto(z + c + 16 * k, sum[k], n - 16 * k);
  }
}

bool is_valid(const LabelConvFwd& a, int64_t n, int64_t h, int64_t w) {
  return h >= 0 && h < a.H && w >= 0 && w < a.W && (!a.valid || a.valid[(n * a.H + h) * a.W + w]);
}

// labels of the K rows around row h, with K / 2 columns on both sides: [K, W + K - 1]
void gather_labels(const LabelConvFwd& a, int64_t n, int64_t h, int32_t* around, int32_t* column) {
  const int64_t pad = a.K / 2, width = a.W + a.K - 1;
  for (int64_t i = 0; i < a.K; ++i) {
    for (int64_t j = 0; j < width; ++j) {
      const int64_t y = h + i - pad, x = j - pad;
      int32_t label = kNoClass;
      if (is_valid(a, n, y, x)) {
        int64_t l = a.labels[(n * a.H + y) * a.W + x];
        if (l >= 0 && l < a.C) label = (int32_t)l;
      }
      around[i * width + j] = label;
      column[j] = i == 0 || column[j] == label ? label : kMixed;
    }
  }
}

template <class T>
void label_row(const LabelConvFwd& a, int64_t n, int64_t h, T* z, int32_t* around, Term* terms) {
  const int64_t width = a.W + a.K - 1;
  int32_t* column = around + a.K * width;
  gather_labels(a, n, h, around, column);
  for (int64_t w = 0; w < a.W; ++w, z += a.c_out) {
    int32_t label = column[w];
    for (int64_t j = 1; j < a.K; ++j) label = column[w + j] == label ? label : kMixed;
    if (label == kNoClass) {
      std::memset(z, 0, (size_t)a.c_out * sizeof(T));
      continue;
    }
    if (label != kMixed) {
      const float* row = a.interior + label * a.c_out;
      for (int64_t c = 0; c < a.c_out; c += 16) {
        store_upto(z + c, load_upto(row + c, a.c_out - c), a.c_out - c);
      }
      continue;
    }
    int64_t count = 0;
    for (int64_t i = 0; i < a.K; ++i) {
      for (int64_t j = 0; j < a.K; ++j) {
        int32_t l = around[i * width + w + j];
        if (l == kNoClass) continue;
        terms[count++] = {(const T*)a.table + ((i * a.K + j) * a.C + l) * a.c_out, 1.0f, false};
      }
    }
    sum_rows(z, terms, count, a.c_out);
  }
}

// Each listed class of the pixel at tap (i, j) as a term; with a rest, the rest's row and what the
// listed classes do not take of it.
template <class T>
int64_t topk_terms(const LabelConvFwd& a, int64_t n, int64_t h, int64_t w, int64_t tap,
                   Term* terms) {
  const int64_t plane = a.H * a.W, pixel = h * a.W + w;
  const int64_t* indices = a.topk_indices + n * a.k * plane + pixel;
  const float* values = a.topk_values + n * a.k * plane + pixel;
  const float rest = a.topk_rest ? a.topk_rest[n * plane + pixel] : 0.0f;
  int64_t count = 0;
  for (int64_t j = 0; j < a.k; ++j) {
    const int64_t c = indices[j * plane];
    if (c < 0 || c >= a.C) continue;
    float weight = values[j * plane];
    if (rest != 0.0f) {
      bool first = true;
      for (int64_t i = 0; i < j; ++i) first = first && indices[i * plane] != c;
      if (first) weight -= rest;
    }
    terms[count++] = {(const T*)a.table + (tap * a.C + c) * a.c_out, weight, false};
  }
  if (rest != 0.0f) terms[count++] = {a.rest_table + tap * a.c_out, rest, true};
  return count;
}

template <class T>
void topk_row(const LabelConvFwd& a, int64_t n, int64_t h, T* z, Term* terms) {
  const int64_t pad = a.K / 2;
  for (int64_t w = 0; w < a.W; ++w, z += a.c_out) {
    int64_t count = 0;
    for (int64_t tap = 0; tap < a.K * a.K; ++tap) {
      const int64_t y = h + tap / a.K - pad, x = w + tap % a.K - pad;
      if (is_valid(a, n, y, x)) count += topk_terms<T>(a, n, y, x, tap, terms + count);
    }
    sum_rows(z, terms, count, a.c_out);
  }
}

}  // namespace

void label_conv_fwd(const LabelConvFwd& a) {
  const int64_t most_terms = a.K * a.K * (a.labels ? 1 : a.k + 1);
  parallel(a.N * a.strip.rows, a.W * a.c_out * a.K, [&](int64_t begin, int64_t end) {
    Scratch terms(most_terms * (int64_t)(sizeof(Term) / sizeof(float)));
    Scratch around(a.labels ? (a.K + 1) * (a.W + a.K - 1) : 0);
    with_dtype(a.dtype, [&](auto tag) {
      using T = decltype(tag);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = i / a.strip.rows, r = i % a.strip.rows, h = a.strip.row0 + r;
        T* z = (T*)a.z + n * a.z_image_stride + r * a.W * a.c_out;
        if (h < 0 || h >= a.H) {
          std::memset(z, 0, (size_t)(a.W * a.c_out) * sizeof(T));
        } else if (a.labels) {
          label_row(a, n, h, z, (int32_t*)around.get(), (Term*)terms.get());
        } else {
          topk_row(a, n, h, z, (Term*)terms.get());
        }
      }
    });
  });
}

}  // namespace GPL_CPU_NAMESPACE
}  // namespace gpl_fast
