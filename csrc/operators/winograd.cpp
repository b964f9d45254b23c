// 3 x 3 convolutions of stride 1 by Winograd, and the weights that they read.
#include "dispatch.h"

namespace gpl_fast {

STABLE_TORCH_LIBRARY_FRAGMENT(gpl_fast, m) {
  m.def("winograd_weight(Tensor w, int tile, bool transposed, Tensor(a!) u) -> ()");
  m.def("winograd(Tensor x, Tensor u, int tile, int pad_h, int row0, Tensor(a!) z) -> ()");
}

namespace {

// Of a weight as `winograd` reads it.
DType winograd_dtype(const Tensor& u, int64_t tile, int64_t C_in, int64_t C_out) {
  STD_TORCH_CHECK(tile == 2 || tile == 4, "gpl_fast: tile must be 2 or 4, got ", tile);
  const DType dtype = float_dtype(u, "u");
  STD_TORCH_CHECK(dtype != DType::kFloat16, "gpl_fast: u must be float32 or bfloat16");
  contiguous(u, "u", u.scalar_type(),
             {(tile + 2) * (tile + 2) * padded_to(C_in, 2) * padded_to(C_out, 32)});
  return dtype;
}

void winograd_weight(const Tensor& w, int64_t tile, bool transposed, const Tensor& u) {
  STD_TORCH_CHECK(w.dim() == 4 && w.size(1) == 3 && w.size(2) == 3,
                  "gpl_fast: w must be [C_out, 3, 3, C_in], got ", text(w.sizes()));
  WinogradWeight a = {};
  a.tile = tile, a.transposed = transposed;
  a.C_in = w.size(transposed ? 0 : 3), a.C_out = w.size(transposed ? 3 : 0);
  a.dtype = float_dtype(w, "w");
  STD_TORCH_CHECK(a.dtype != DType::kFloat16, "gpl_fast: w must be float32 or bfloat16");
  a.w = contiguous(w, "w", w.scalar_type(), {w.size(0), 3, 3, w.size(3)});
  a.u_dtype = winograd_dtype(u, tile, a.C_in, a.C_out), a.u = u.data_ptr();
  STD_TORCH_CHECK(a.u_dtype != DType::kBFloat16 || a.dtype == DType::kBFloat16,
                  "gpl_fast: u must be float32 where w is");
  cpu::winograd_weight(a);
}

void winograd(const Tensor& x, const Tensor& u, int64_t tile, int64_t pad_h, int64_t row0,
              const Tensor& z) {
  STD_TORCH_CHECK(x.dim() == 4, "gpl_fast: x must be [N, rows, W, C_in], got ", text(x.sizes()));
  STD_TORCH_CHECK(z.dim() == 4, "gpl_fast: z must be [N, rows, W, C_out], got ", text(z.sizes()));
  STD_TORCH_CHECK(pad_h == 0 || pad_h == 1, "gpl_fast: pad_h must be 0 or 1, got ", pad_h);
  Winograd a = {};
  a.N = x.size(0), a.x_rows = x.size(1), a.W = x.size(2), a.C_in = x.size(3), a.C_out = z.size(3);
  a.rows = a.x_rows + 2 * pad_h - 2, a.tile = tile, a.pad_h = pad_h, a.row0 = row0;
  a.dtype = float_dtype(x, "x"), a.z_dtype = same_or_float32(z, "z", x, "x");
  a.x_image_stride = image_stride(x, "x", x.scalar_type(), {a.N, a.x_rows, a.W, a.C_in});
  a.z_image_stride = image_stride(z, "z", z.scalar_type(), {a.N, a.rows, a.W, a.C_out});
  a.x = x.data_ptr(), a.z = z.data_ptr();
  a.u_dtype = winograd_dtype(u, tile, a.C_in, a.C_out), a.u = u.data_ptr();
  STD_TORCH_CHECK(a.u_dtype != DType::kBFloat16 || a.dtype != DType::kFloat16,
                  "gpl_fast: x must be float32 or bfloat16 where u is bfloat16");
  if (z.numel() == 0) return;
  cpu::winograd(a);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gpl_fast, CPU, m) {
  m.impl("winograd_weight", TORCH_BOX(&winograd_weight));
  m.impl("winograd", TORCH_BOX(&winograd));
}

}  // namespace gpl_fast
