// ReLU of one branch, of both in the difference form, and its gradient.
#include "dispatch.h"

namespace gpl_fast {

STABLE_TORCH_LIBRARY_FRAGMENT(gpl_fast, m) {
  m.def("relu_fwd(Tensor z, Tensor(a!) y, Tensor(b!)? mask=None) -> ()");
  m.def(
      "relu_diff_fwd(Tensor z, Tensor dz, Tensor from_target, Tensor(a!) delta, "
      "Tensor(b!)? y=None, Tensor(c!)? mask=None) -> ()");
  m.def("relu_bwd(Tensor dy, Tensor mask, Tensor(a!) dz) -> ()");
}

namespace {

void relu_fwd_any(const Tensor& z, const MaybeTensor& dz, const MaybeTensor& from_target,
                  const MaybeTensor& y, const MaybeTensor& delta, const MaybeTensor& mask) {
  STD_TORCH_CHECK(z.dim() == 4, "gpl_fast: z must be [N, H, W, C], got ", text(z.sizes()));
  const int64_t N = z.size(0), H = z.size(1), W = z.size(2), C = z.size(3);
  const Shape shape = {N, H, W, C};
  ReluFwd a = {};
  a.pixels = N * H * W, a.image_pixels = H * W, a.C = C;
  a.dtype = float_dtype(z, "z");
  a.from_target = from_target_of(from_target, N);
  a.z = contiguous(z, "z", z.scalar_type(), shape);
  a.dz = contiguous<void>(dz, "dz", z.scalar_type(), shape);
  a.y = contiguous<void>(y, "y", z.scalar_type(), shape);
  a.delta = contiguous<void>(delta, "delta", z.scalar_type(), shape);
  a.mask = contiguous<uint8_t>(mask, "mask", ScalarType::Byte, {N, H, W, ceil_div(C, 8)});
  if (a.pixels * C == 0) return;
  cpu::relu_fwd(a);
}

void relu_fwd(const Tensor& z, const Tensor& y, const MaybeTensor& mask) {
  relu_fwd_any(z, {}, {}, y, {}, mask);
}

void relu_diff_fwd(const Tensor& z, const Tensor& dz, const Tensor& from_target,
                   const Tensor& delta, const MaybeTensor& y, const MaybeTensor& mask) {
  relu_fwd_any(z, dz, from_target, y, delta, mask);
}

void relu_bwd(const Tensor& dy, const Tensor& mask, const Tensor& dz) {
  STD_TORCH_CHECK(dy.dim() == 4, "gpl_fast: dy must be [N, H, W, C], got ", text(dy.sizes()));
  const int64_t N = dy.size(0), H = dy.size(1), W = dy.size(2), C = dy.size(3);
  check_device(dz, "dz", {{"dy", dy}, {"mask", mask}});
  ReluBwd a = {};
  a.pixels = N * H * W, a.C = C;
  a.dtype = float_dtype(dy, "dy");
  a.dy = contiguous(dy, "dy", dy.scalar_type(), {N, H, W, C});
  a.mask = (const uint8_t*)contiguous(mask, "mask", ScalarType::Byte, {N, H, W, ceil_div(C, 8)});
  a.dz = contiguous(dz, "dz", dy.scalar_type(), {N, H, W, C});
  if (a.pixels * C == 0) return;
  GPL_FAST_RUN(relu_bwd, dz, a);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gpl_fast, CPU, m) {
  m.impl("relu_fwd", TORCH_BOX(&relu_fwd));
  m.impl("relu_diff_fwd", TORCH_BOX(&relu_diff_fwd));
  m.impl("relu_bwd", TORCH_BOX(&relu_bwd));
}

#ifdef GPL_FAST_CUDA
STABLE_TORCH_LIBRARY_IMPL(gpl_fast, CUDA, m) { m.impl("relu_bwd", TORCH_BOX(&relu_bwd)); }
#endif

}  // namespace gpl_fast
