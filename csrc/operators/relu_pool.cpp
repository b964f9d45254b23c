// ReLU and 2 x 2 pooling of one branch, of both in the difference form, and their gradient.
#include "dispatch.h"

namespace gpl_fast {

STABLE_TORCH_LIBRARY_FRAGMENT(gpl_fast, m) {
  m.def("relu_pool_fwd(Tensor z, int pool, Tensor(a!) y, Tensor(b!)? code=None) -> ()");
  m.def(
      "relu_pool_diff_fwd(Tensor z, Tensor dz, Tensor from_target, int pool, Tensor(a!) delta, "
      "Tensor(b!)? y=None, Tensor(c!)? code=None) -> ()");
  m.def(
      "relu_pool_bwd(Tensor dy, Tensor code, int pool, int height, int width, int row0, "
      "Tensor(a!) dz) -> ()");
}

namespace {

void relu_pool_fwd_any(const Tensor& z, const MaybeTensor& dz, const MaybeTensor& from_target,
                       int64_t pool, const MaybeTensor& y, const MaybeTensor& delta,
                       const MaybeTensor& code) {
  STD_TORCH_CHECK(z.dim() == 4, "gpl_fast: z must be [N, H, W, C], got ", text(z.sizes()));
  ReluPoolFwd a = {};
  a.N = z.size(0), a.H = z.size(1), a.W = z.size(2), a.C = z.size(3);
  a.pool = pool_of(pool);
  const Tensor& out = y ? *y : *delta;
  const ScalarType dtype = out.scalar_type();
  a.dtype = float_dtype(out, y ? "y" : "delta");
  a.z_dtype = same_or_float32(z, "z", out, y ? "y" : "delta");
  const Shape full = {a.N, a.H, a.W, a.C}, pooled = {a.N, a.H / 2, a.W / 2, a.C};
  a.z_image_stride = image_stride(z, "z", z.scalar_type(), full);
  a.dz_image_stride = image_stride(dz, "dz", z.scalar_type(), full);
  a.y_image_stride = image_stride(y, "y", dtype, pooled);
  a.delta_image_stride = image_stride(delta, "delta", dtype, pooled);
  a.code_image_stride = code_image_stride(code, a.pool, a.N, a.H, a.W, a.C);
  a.from_target = from_target_of(from_target, a.N);
  a.z = z.data_ptr(), a.dz = data(dz);
  a.y = data(y), a.delta = data(delta), a.code = (uint8_t*)data(code);
  if (z.numel() == 0) return;
  cpu::relu_pool_fwd(a);
}

void relu_pool_fwd(const Tensor& z, int64_t pool, const Tensor& y, const MaybeTensor& code) {
  relu_pool_fwd_any(z, {}, {}, pool, y, {}, code);
}

void relu_pool_diff_fwd(const Tensor& z, const Tensor& dz, const Tensor& from_target, int64_t pool,
                        const Tensor& delta, const MaybeTensor& y, const MaybeTensor& code) {
  relu_pool_fwd_any(z, dz, from_target, pool, y, delta, code);
}

void relu_pool_bwd(const Tensor& dy, const Tensor& code, int64_t pool, int64_t height,
                   int64_t width, int64_t row0, const Tensor& dz) {
  STD_TORCH_CHECK(dy.dim() == 4, "gpl_fast: dy must be [N, H / 2, W / 2, C], got ",
                  text(dy.sizes()));
  STD_TORCH_CHECK(dz.dim() == 4, "gpl_fast: dz must be [N, rows, W, C], got ", text(dz.sizes()));
  check_device(dz, "dz", {{"dy", dy}, {"code", code}});
  ReluPoolBwd a = {};
  a.N = dy.size(0), a.H = height, a.W = width, a.C = dy.size(3);
  a.strip = {row0, dz.size(1)};
  a.pool = pool_of(pool);
  a.dtype = float_dtype(dy, "dy");
  const ScalarType dtype = dy.scalar_type();
  a.dy_image_stride = image_stride(dy, "dy", dtype, {a.N, height / 2, width / 2, a.C});
  a.dz_image_stride = image_stride(dz, "dz", dtype, {a.N, dz.size(1), width, a.C});
  a.code_image_stride = code_image_stride(code, a.pool, a.N, height, width, a.C);
  a.dy = dy.data_ptr(), a.code = (const uint8_t*)code.data_ptr(), a.dz = dz.data_ptr();
  if (dz.numel() == 0) return;
  GPL_FAST_RUN(relu_pool_bwd, dz, a);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gpl_fast, CPU, m) {
  m.impl("relu_pool_fwd", TORCH_BOX(&relu_pool_fwd));
  m.impl("relu_pool_diff_fwd", TORCH_BOX(&relu_pool_diff_fwd));
  m.impl("relu_pool_bwd", TORCH_BOX(&relu_pool_bwd));
}

#ifdef GPL_FAST_CUDA
STABLE_TORCH_LIBRARY_IMPL(gpl_fast, CUDA, m) { m.impl("relu_pool_bwd", TORCH_BOX(&relu_pool_bwd)); }
#endif

}  // namespace gpl_fast
