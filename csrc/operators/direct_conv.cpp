// Convolutions of stride 1 by the definition in bfloat16, and the weights that they read.
#include "dispatch.h"

namespace gpl_fast {

STABLE_TORCH_LIBRARY_FRAGMENT(gpl_fast, m) {
  m.def("direct_weight(Tensor w, bool transposed, Tensor(a!) u) -> ()");
  m.def("direct_conv(Tensor x, Tensor u, int K, int pad_h, Tensor(a!) z) -> ()");
}

namespace {

// Of a weight as `direct_conv` reads it.
int64_t direct_elements(int64_t K, int64_t C_in, int64_t C_out) {
  return K * K * padded_to(C_in, 32) * padded_to(C_out, 32);
}

void direct_weight(const Tensor& w, bool transposed, const Tensor& u) {
  STD_TORCH_CHECK(w.dim() == 4 && w.size(1) == w.size(2) && w.size(1) % 2 == 1,
                  "gpl_fast: w must be [C_out, K, K, C_in] with an odd K, got ", text(w.sizes()));
  DirectWeight a = {};
  a.K = w.size(1), a.transposed = transposed;
  a.C_in = w.size(transposed ? 0 : 3), a.C_out = w.size(transposed ? 3 : 0);
  a.w = contiguous(w, "w", ScalarType::BFloat16, {w.size(0), a.K, a.K, w.size(3)});
  a.u = contiguous(u, "u", ScalarType::BFloat16, {direct_elements(a.K, a.C_in, a.C_out)});
  cpu::direct_weight(a);
}

void direct_conv(const Tensor& x, const Tensor& u, int64_t K, int64_t pad_h, const Tensor& z) {
  STD_TORCH_CHECK(x.dim() == 4, "gpl_fast: x must be [N, rows, W, C_in], got ", text(x.sizes()));
  STD_TORCH_CHECK(z.dim() == 4, "gpl_fast: z must be [N, rows, W, C_out], got ", text(z.sizes()));
  STD_TORCH_CHECK(K > 0 && K % 2 == 1, "gpl_fast: K must be odd, got ", K);
  STD_TORCH_CHECK(pad_h >= 0 && pad_h <= K / 2, "gpl_fast: pad_h must be in 0 to ", K / 2, ", got ",
                  pad_h);
  DirectConv a = {};
  a.N = x.size(0), a.x_rows = x.size(1), a.W = x.size(2), a.C_in = x.size(3), a.C_out = z.size(3);
  a.rows = a.x_rows + 2 * pad_h - K + 1, a.K = K, a.pad_h = pad_h;
  a.dtype = float_dtype(x, "x"), a.z_dtype = same_or_float32(z, "z", x, "x");
  STD_TORCH_CHECK(a.dtype != DType::kFloat16, "gpl_fast: x must be float32 or bfloat16");
  a.x_image_stride = image_stride(x, "x", x.scalar_type(), {a.N, a.x_rows, a.W, a.C_in});
  a.z_image_stride = image_stride(z, "z", z.scalar_type(), {a.N, a.rows, a.W, a.C_out});
  a.x = x.data_ptr(), a.z = z.data_ptr();
  a.u = contiguous(u, "u", ScalarType::BFloat16, {direct_elements(K, a.C_in, a.C_out)});
  if (z.numel() == 0) return;
  cpu::direct_conv(a);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gpl_fast, CPU, m) {
  m.impl("direct_weight", TORCH_BOX(&direct_weight));
  m.impl("direct_conv", TORCH_BOX(&direct_conv));
}

}  // namespace gpl_fast
