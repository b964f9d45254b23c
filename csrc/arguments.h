// What the stages are given (stages.h): plain pointers and sizes. Free of torch headers.
#pragma once

#include <algorithm>
#include <cstdint>

// Whether the compiler knows what x86 has for bfloat16: AMX, and vdpbf16ps.
#if defined(GPL_FAST_X86) && \
    ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11))
#define GPL_FAST_BF16 1
#endif

namespace gpl_fast {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16, kLabels };  // kLabels: as BinaryCe's
enum class Activation : int32_t { kNone, kSoftmax, kSigmoid };
constexpr const char* kActivationNames[] = {"none", "softmax", "sigmoid"};
enum class Pool : int32_t { kMax, kAvg, kNone };
enum class Criterion : int32_t { kL2, kL1 };

// Strides in elements of an [N, C, H, W] tensor of the caller's.
struct Strides {
  int64_t n, c, h, w;
};

// Rows [row0, row0 + rows) of every image; a row outside [0, H) is a halo and written as zeros.
struct Strip {
  int64_t row0, rows;
};

// Which pixels of [N, H, W] count: flags, or weights of which one above 0 counts; of flags they are
// 1. Both null: all count.
struct Valid {
  const uint8_t* flags;
  const float* weights;
};

// The cross-entropy of SegmentationLoss, which shares the passes over the logits.
struct CrossEntropy {
  const int64_t* labels;      // [N, H, W], null = no cross-entropy; outside [0, C) = not counted
  const float* class_weight;  // [C], null = 1
  const float* mask;          // [N, H, W], null = 1: weights of pixels
  float label_smoothing;
  bool own_lse;  // the activation's lse is not the one of x itself
};

// 1 / T, finite and positive whatever T is: times 0 it is 0.
inline float inverse_of(double temperature) {
  return (float)(1.0 / std::clamp(temperature, 0x1p-126, 0x1p128));
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t padded_to(int64_t channels, int64_t multiple) {
  return ceil_div(channels, multiple) * multiple;
}

struct SoftmaxPackFwd {
  int64_t N, C, H, W, c_pad;
  Strip strip, core;
  Activation activation, target_activation;
  float inv_t, target_inv_t;  // 1 / T; of the target 1 where it alone is taken as it is
  float lse_t;                // T, bounded so that max + T log sum is finite
  DType x_dtype, target_dtype, dtype;
  const void* x;  // [N, C, H, W]
  Strides x_strides;
  Valid valid;
  const void* target;  // [N, C, H, W] or null; of kLabels 1 where it is 1
  Strides target_strides;
  const uint8_t* elements;  // [N, C, H, W] or null, with target: maps are 0 where it is 2
  Strides elements_strides;
  const int64_t* labels;        // [N, H, W] or null
  const float* topk_values;     // [N, k, H, W] or null
  const int64_t* topk_indices;  // [N, k, H, W]
  const float* topk_rest;       // [N, H, W] or null: the value of every class that is not listed
  int64_t k, topk_image_stride, topk_stride;  // of an image, of one of its k planes
  CrossEntropy ce;
  // [N, rows, W, c_pad] or null. With target: of prediction and target as in ReluPoolFwd. With
  // labels or topk_values: the prediction, less the target where taken.
  void* y;
  int64_t y_image_stride;
  void* delta;  // [N, rows, W, c_pad], with target: the prediction less the target
  int64_t delta_image_stride;
  uint8_t* taken;              // [N, rows, W], with labels or topk_values
  const uint8_t* from_target;  // [N], with target
  // [N, H, W] or null: max + T log sum_c e^((x_c - max) / T), in the units of x, finite for any T.
  // Rounding leaves it at max or above, and T log sum at most doubled: e^((x - lse) / T) is at most
  // 1, and that of the largest logit no less than 1 / C^2.
  float* lse;
  float* ce_lse;    // [N, H, W] or null: the same with T = 1, where ce.own_lse
  double* ce_rows;  // [N, H, 2]: sum of the losses, sum of the weights
};

struct LabelConvFwd {
  int64_t N, C, H, W, K, c_out;
  Strip strip;
  DType dtype;
  const int64_t* labels;        // [N, H, W] or null
  const float* topk_values;     // [N, k, H, W] or null
  const int64_t* topk_indices;  // [N, k, H, W]
  const float* topk_rest;       // [N, H, W] or null
  int64_t k;
  Valid valid;
  const void* table;        // [K * K, C, c_out]
  const float* interior;    // [C, c_out], labels only: the taps' sum
  const float* rest_table;  // [K * K, c_out], with topk_rest: the classes' sum
  const uint8_t* taken;     // [N, taken_strip.rows, W]: of SoftmaxPackFwd
  Strip taken_strip;
  const uint8_t* from_target;  // [N]
  void* z;                     // [N, rows, W, c_out], as in ReluPoolFwd
  void* dz;  // [N, rows, W, c_out]: on entry the convolution of SoftmaxPackFwd's y
  int64_t z_image_stride, dz_image_stride;
};

// Weights as Winograd reads them.
struct WinogradWeight {
  int64_t C_in, C_out;   // of the convolution that is to be done
  int64_t tile;          // of F(tile x tile, 3 x 3): 2 or 4
  bool transposed;       // eq. (4): that of the data gradient
  DType dtype, u_dtype;  // float32 or bfloat16; of u only where w has it
  const void* w;  // [C_out, 3, 3, C_in]; transposed: [C_in, 3, 3, C_out], taps to be reversed
  void* u;        // [(tile + 2)^2 * padded_to(C_in, 2) * padded_to(C_out, 32)], in its own order
};

// z = 3 x 3 convolution of stride 1, with a column of zeros on both sides.
struct Winograd {
  int64_t N, rows, x_rows, W, C_in, C_out;  // rows of z: x_rows + 2 * pad_h - 2
  int64_t tile, pad_h, row0;                // row0: the image's row that z begins with
  DType dtype, z_dtype;                     // the same, or z's is float32
  DType u_dtype;                            // bfloat16: to which what it multiplies is rounded
  const void* x;                            // [N, x_rows, W, C_in]
  const void* u;                            // of WinogradWeight
  void* z;                                  // [N, rows, W, C_out]
  int64_t x_image_stride, z_image_stride;
};

// Weights as DirectConv reads them.
struct DirectWeight {
  int64_t C_in, C_out, K;  // of the convolution that is to be done
  bool transposed;         // as in WinogradWeight
  const void* w;           // bfloat16 [C_out, K, K, C_in]; transposed: [C_in, K, K, C_out]
  void* u;  // bfloat16 [K * K * padded_to(C_in, 32) * padded_to(C_out, 32)], in its own order
};

// z = K x K convolution of stride 1, with K / 2 columns of zeros on both sides; of bfloat16, to
// which float32 maps are rounded.
struct DirectConv {
  int64_t N, rows, x_rows, W, C_in, C_out;  // rows of z: x_rows + 2 * pad_h - K + 1
  int64_t K, pad_h;
  DType dtype, z_dtype;  // as in Winograd
  const void* x;         // [N, x_rows, W, C_in]
  const void* u;         // of DirectWeight
  void* z;               // [N, rows, W, C_out]
  int64_t x_image_stride, z_image_stride;
};

struct ReluFwd {
  int64_t pixels, image_pixels, C;
  DType dtype;
  const void* z;               // [pixels, C], as in ReluPoolFwd
  const void* dz;              // [pixels, C] or null
  void* y;                     // [pixels, C] or null
  void* delta;                 // [pixels, C]
  uint8_t* mask;               // [pixels, ceil(C / 8)] or null
  const uint8_t* from_target;  // [N], with dz
};

// z and y belong to the target where its image is in from_target, else to the prediction; dz and
// delta are the prediction's less the target's, null in the plain form. code is null where no
// gradient will be asked for.
struct ReluPoolFwd {
  int64_t N, H, W, C;
  Pool pool;
  DType z_dtype, dtype;        // of z and dz: the same, or float32
  const void* z;               // [N, H, W, C]
  const void* dz;              // [N, H, W, C]
  void* y;                     // [N, H / 2, W / 2, C] or null
  void* delta;                 // [N, H / 2, W / 2, C]
  uint8_t* code;               // max [N, H / 2, W / 2, ceil(C / 2)], avg [N, H, W, ceil(C / 8)]
  const uint8_t* from_target;  // [N], with dz
  int64_t z_image_stride, dz_image_stride, y_image_stride, delta_image_stride, code_image_stride;
};

struct DiffReduceFwd {
  int64_t N, M, C;
  DType dtype;
  Criterion criterion;
  const void* delta;    // [N, M / C, C]
  const float* weight;  // [C] or null
  void* seed;           // [N, M / C, C] or null: half the derivative of a square, or that of |d|
  double* sum;          // [N]
};

// Of features over their norm: y are the prediction's.
struct UnitDiffFwd {
  int64_t N, pixels, C;
  Criterion criterion;
  float eps;
  bool eps_inside;  // of the root, or added to it
  DType dtype, target_dtype, seed_dtype;
  const void* y;        // [N, pixels, C]
  const void* target;   // [N, pixels, C]
  const float* weight;  // [C] or null
  void* seed;           // [N, pixels, C] or null
  float* distances;     // [N, pixels] or null
  double* sum;          // [N]
  int64_t y_image_stride, target_image_stride, seed_image_stride, distances_image_stride;
};

struct ReluPoolBwd {
  int64_t N, H, W, C;
  Strip strip;
  Pool pool;
  DType dtype;
  const void* dy;       // [N, H / 2, W / 2, C]
  const uint8_t* code;  // as in ReluPoolFwd
  void* dz;             // [N, rows, W, C]
  int64_t dy_image_stride, code_image_stride, dz_image_stride;
};

struct ReluBwd {
  int64_t pixels, C;
  DType dtype;
  const void* dy;       // [pixels, C]
  const uint8_t* mask;  // [pixels, ceil(C / 8)]
  void* dz;             // [pixels, C]
};

struct SoftmaxBwd {
  int64_t N, C, H, W, c_pad;
  Strip strip;
  Activation activation;
  float inv_t;  // 1 / T
  DType x_dtype, dtype;
  const void* x;  // [N, C, H, W]
  Strides x_strides;
  const float* lse;  // [N, H, W], as in SoftmaxPackFwd
  const void* dy;    // [N, rows, W, c_pad] or null
  int64_t dy_image_stride;
  const float* scale;  // [N]
  Valid valid;
  CrossEntropy ce;
  const float* ce_lse;    // [N, H, W]
  const float* ce_scale;  // [N]
  void* dx;               // [N, C, H, W], x's dtype
  Strides dx_strides;
};

// The binary cross-entropy of single elements, with logits.
struct BinaryCe {
  int64_t N, C, H, W;
  Strip strip;
  DType x_dtype;
  const void* x;  // [N, C, H, W]
  Strides x_strides;
  const uint8_t* labels;  // [N, C, H, W], rows contiguous: 0, 1, or 2 = does not count
  Strides labels_strides;
  const float* class_weight;  // [C], null = 1
  const float* pos_weight;    // [C], null = 1: of what is labelled 1
  const float* mask;          // [N, H, W], null = 1: by which a pixel's elements count
  float label_smoothing;      // a label y is y (1 - e) + e / 2
};

struct BinaryCeFwd : BinaryCe {
  double* sums;  // [N, H, 2]: of the losses, of what counts
};

struct BinaryCeBwd : BinaryCe {
  const float* scale;  // [N], null: nothing is added
  void* dx;            // [N, C, H, W], x's dtype: the gradient is added to it
  Strides dx_strides;
  bool clear;  // dx becomes 0 where an element does not count
};

// The gradient of a block's last convolution and of what follows it: dx = conv_transpose(dZ, w)
// with dZ made from dy by (3) while it is read.
struct ConvBlockBwd {
  int64_t N, H, W, C_in, C_out, K, stride;  // H, W: of dx
  Strip strip;                              // rows of dx; all of them at stride 2
  Strip dy_strip;                           // the rows of its grid that dy holds; others count as 0
  Pool pool;
  DType dtype;
  bool allow_tf32;  // for float32
  const void* dy;   // [N, dy_strip.rows, w, C_out], w: of the pool's or the convolution's output
  const uint8_t* code;  // as in ReluPoolFwd; kNone [N, h, w, ceil(C_out / 8)], null = no ReLU
  // [K * K, padded_to(C_out, 64), padded_to(C_in, 8)]: tap (i, j) holds w[:, :, K - 1 - i, K - 1 -
  // j]
  const void* w;
  void* dx;  // [N, strip.rows, W, C_in], null with logits
  int64_t dy_image_stride, code_image_stride, dx_image_stride;
  const SoftmaxBwd* logits;  // null, or what dx goes on to; its dy, c_pad and dtype are not read
};

// A step's forward on sm_90a: 3 x 3 convolution of stride 1 of the carried map and of delta, ReLU,
// max pool.
struct ConvBlockFwd {
  int64_t N, H_in, W, C_in, C_out;  // C_in a multiple of 8, C_out of 64
  int64_t rows, row0, image_rows;  // of the convolution: H_in + 2 pad_h - 2, its first, its image's
  int64_t pad_h;                   // rows of zeros above and below
  DType dtype;                     // bfloat16 or float16
  const void *a, *d;               // [N, H_in, W, C_in]
  const void* weight;              // [9 * C_in, C_out], rows by tap, then channel
  const float* bias;               // [C_out] or null
  const uint8_t* from_target;      // [N]
  void *y, *delta;                 // [N, rows / 2, W / 2, C_out] or null
  uint8_t* code;                   // [N, rows / 2, W / 2, C_out / 2] or null
  float* partial;  // [N, conv_block_fwd_programs] or null: sums of the squares of delta as stored
  int64_t a_image_stride, d_image_stride, y_image_stride, delta_image_stride, code_image_stride;
};

// Output channels of a program, which has 128 pixels of each 128 of them, 256 of each 64.
inline int conv_block_fwd_channels(int64_t C_out) { return C_out % 128 == 0 ? 128 : 64; }
inline int64_t conv_block_fwd_programs(int64_t rows, int64_t W, int64_t C_out) {
  const int channels = conv_block_fwd_channels(C_out);
  return ceil_div(rows, channels == 128 ? 16 : 32) * ceil_div(W, 8) * (C_out / channels);
}

}  // namespace gpl_fast
