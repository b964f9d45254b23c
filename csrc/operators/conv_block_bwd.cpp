// A whole block's gradient by one kernel of csrc/cuda/conv_block, on through the logits or not;
// there is none on the CPU.
#include "dispatch.h"
#include "softmax_bwd.h"

namespace gpl_fast {

STABLE_TORCH_LIBRARY_FRAGMENT(gpl_fast, m) {
  m.def(
      "conv_block_bwd(Tensor dy, Tensor w, int pool, int stride, int dy_row0, bool allow_tf32, "
      "int height, int row0, Tensor(a!) dx, Tensor? code=None) -> ()");
  m.def(
      "conv_block_logits_bwd(Tensor dy, Tensor w, int pool, int stride, int dy_row0, "
      "bool allow_tf32, Tensor x, Tensor scale, int activation, float temperature, int row0, "
      "int rows, Tensor(a!) dx, float label_smoothing=0.0, Tensor? code=None, Tensor? lse=None, "
      "Tensor? valid=None, Tensor? ce_labels=None, Tensor? ce_mask=None, Tensor? ce_lse=None, "
      "Tensor? ce_scale=None, Tensor? class_weight=None) -> ()");
}

#ifdef GPL_FAST_CUDA
namespace {

// H, W, C_in: of dx, which the caller's dx or logits hold.
ConvBlockBwd conv_block_args(const Tensor& dy, const MaybeTensor& code, const Tensor& w,
                             int64_t pool, int64_t stride, int64_t dy_row0, bool allow_tf32,
                             int64_t H, int64_t W, int64_t C_in, Strip strip) {
  STD_TORCH_CHECK(dy.dim() == 4, "gpl_fast: dy must be [N, rows, w, C_out], got ",
                  text(dy.sizes()));
  STD_TORCH_CHECK(w.dim() == 3, "gpl_fast: w must be [K * K, C_out padded, C_in padded], got ",
                  text(w.sizes()));
  STD_TORCH_CHECK(pool >= 0 && pool <= 2,
                  "gpl_fast: pool must be 0 (max), 1 (avg) or 2 (none), got ", pool);
  STD_TORCH_CHECK(stride == 1 || stride == 2, "gpl_fast: stride must be 1 or 2, got ", stride);
  STD_TORCH_CHECK(stride == 1 || (strip.row0 == 0 && strip.rows == H),
                  "gpl_fast: a stride of 2 takes all rows at once");
  ConvBlockBwd a = {};
  a.N = dy.size(0), a.H = H, a.W = W, a.C_in = C_in, a.C_out = dy.size(3);
  while (a.K * a.K < w.size(0)) ++a.K;
  STD_TORCH_CHECK(a.K * a.K == w.size(0) && a.K % 2 == 1,
                  "gpl_fast: w must hold K * K taps, K odd, got ", w.size(0));
  a.stride = stride, a.strip = strip, a.dy_strip = {dy_row0, dy.size(1)};
  a.pool = (Pool)pool, a.dtype = float_dtype(dy, "dy"), a.allow_tf32 = allow_tf32;
  const ScalarType dtype = dy.scalar_type();
  const int64_t conv_h = ceil_div(H, stride), conv_w = ceil_div(W, stride);
  const int64_t dy_w = a.pool == Pool::kNone ? conv_w : conv_w / 2;
  a.dy_image_stride = image_stride(dy, "dy", dtype, {a.N, dy.size(1), dy_w, a.C_out});
  STD_TORCH_CHECK(code || a.pool == Pool::kNone, "gpl_fast: a pool needs its code");
  a.code_image_stride = code_image_stride(code, a.pool, a.N, conv_h, conv_w, a.C_out);
  a.dy = dy.data_ptr(), a.code = (const uint8_t*)data(code);
  a.w = contiguous(w, "w", dtype, {w.size(0), padded_to(a.C_out, 64), padded_to(C_in, 8)});
  STD_TORCH_CHECK((uintptr_t)a.w % 16 == 0, "gpl_fast: w must start at a multiple of 16 bytes");
  return a;
}

void conv_block_bwd(const Tensor& dy, const Tensor& w, int64_t pool, int64_t stride,
                    int64_t dy_row0, bool allow_tf32, int64_t height, int64_t row0,
                    const Tensor& dx, const MaybeTensor& code) {
  STD_TORCH_CHECK(dx.dim() == 4, "gpl_fast: dx must be [N, rows, W, C_in], got ", text(dx.sizes()));
  check_device(dx, "dx", {{"dy", dy}, {"code", code}, {"w", w}});
  ConvBlockBwd a = conv_block_args(dy, code, w, pool, stride, dy_row0, allow_tf32, height,
                                   dx.size(2), dx.size(3), {row0, dx.size(1)});
  a.dx_image_stride = image_stride(dx, "dx", dy.scalar_type(), {a.N, dx.size(1), a.W, a.C_in});
  a.dx = dx.data_ptr();
  if (dx.numel() == 0) return;
  on_current_stream(dx, a, cuda::conv_block_bwd);
}

void conv_block_logits_bwd(const Tensor& dy, const Tensor& w, int64_t pool, int64_t stride,
                           int64_t dy_row0, bool allow_tf32, const Tensor& x, const Tensor& scale,
                           int64_t activation, double temperature, int64_t row0, int64_t rows,
                           const Tensor& dx, double label_smoothing, const MaybeTensor& code,
                           const MaybeTensor& lse, const MaybeTensor& valid,
                           const MaybeTensor& ce_labels, const MaybeTensor& ce_mask,
                           const MaybeTensor& ce_lse, const MaybeTensor& ce_scale,
                           const MaybeTensor& class_weight) {
  const SoftmaxBwd logits =
      softmax_bwd_args(x, activation, temperature, row0, rows, dx, label_smoothing, lse, {}, scale,
                       valid, ce_labels, ce_mask, ce_lse, ce_scale, class_weight, true);
  check_device(dx, "dx", {{"dy", dy}, {"code", code}, {"w", w}});
  ConvBlockBwd a = conv_block_args(dy, code, w, pool, stride, dy_row0, allow_tf32, logits.H,
                                   logits.W, logits.C, {row0, rows});
  STD_TORCH_CHECK(a.N == logits.N, "gpl_fast: dy must have the images of x, ", logits.N, ", got ",
                  a.N);
  a.logits = &logits;
  if (logits.N * logits.C * logits.W * rows == 0) return;
  on_current_stream(dx, a, cuda::conv_block_bwd);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gpl_fast, CUDA, m) {
  m.impl("conv_block_bwd", TORCH_BOX(&conv_block_bwd));
  m.impl("conv_block_logits_bwd", TORCH_BOX(&conv_block_logits_bwd));
}
#endif

}  // namespace gpl_fast
