// A step's forward by the kernel of csrc/cuda/conv_block for sm_90a; other GPUs and forms have
// Triton's.
#include "dispatch.h"

namespace gpl_fast {

STABLE_TORCH_LIBRARY_FRAGMENT(gpl_fast, m) {
  m.def(
      "conv_block_fwd(Tensor a, Tensor d, Tensor weight, Tensor from_target, int pad_h, int row0, "
      "int image_rows, Tensor? bias=None, Tensor(a!)? y=None, Tensor(b!)? delta=None, "
      "Tensor(c!)? code=None, Tensor(d!)? partial=None) -> ()");
}

#ifdef GPL_FAST_CUDA
namespace {

void* pooled(const MaybeTensor& t, const char* name, const ConvBlockFwd& a, ScalarType dtype,
             int64_t channels, int64_t& stride) {
  stride = image_stride(t, name, dtype, {a.N, a.rows / 2, a.W / 2, channels});
  const int64_t bytes = dtype == ScalarType::Byte ? 1 : 2;
  STD_TORCH_CHECK((uintptr_t)data(t) % 16 == 0 && stride * bytes % 16 == 0, "gpl_fast: ", name,
                  " must start at a multiple of 16 bytes");
  return data(t);
}

void conv_block_fwd(const Tensor& a, const Tensor& d, const Tensor& weight,
                    const Tensor& from_target, int64_t pad_h, int64_t row0, int64_t image_rows,
                    const MaybeTensor& bias, const MaybeTensor& y, const MaybeTensor& delta,
                    const MaybeTensor& code, const MaybeTensor& partial) {
  check_device(a, "a",
               {{"d", d},
                {"weight", weight},
                {"from_target", from_target},
                {"bias", bias},
                {"y", y},
                {"delta", delta},
                {"code", code},
                {"partial", partial}});
  STD_TORCH_CHECK(a.dim() == 4, "gpl_fast: a must be [N, H_in, W, C_in], got ", text(a.sizes()));
  STD_TORCH_CHECK(weight.dim() == 2, "gpl_fast: weight must be [9 * C_in, C_out], got ",
                  text(weight.sizes()));
  STD_TORCH_CHECK(pad_h == 0 || pad_h == 1, "gpl_fast: pad_h must be 0 or 1, got ", pad_h);
  ConvBlockFwd r = {};
  r.N = a.size(0), r.H_in = a.size(1), r.W = a.size(2), r.C_in = a.size(3);
  r.C_out = weight.size(1), r.rows = r.H_in + 2 * pad_h - 2;
  r.pad_h = pad_h, r.row0 = row0, r.image_rows = image_rows;
  r.dtype = float_dtype(a, "a");
  const ScalarType dtype = a.scalar_type();
  STD_TORCH_CHECK(r.dtype != DType::kFloat32, "gpl_fast: a must be bfloat16 or float16");
  STD_TORCH_CHECK(r.C_in % 8 == 0 && r.C_out % 64 == 0,
                  "gpl_fast: expected a multiple of 8 channels in and of 64 out, got ", r.C_in,
                  " and ", r.C_out);
  const Shape shape = {r.N, r.H_in, r.W, r.C_in};
  r.a_image_stride = image_stride(a, "a", dtype, shape);
  r.d_image_stride = image_stride(d, "d", dtype, shape);
  r.a = a.data_ptr(), r.d = d.data_ptr();
  r.weight = contiguous(weight, "weight", dtype, {9 * r.C_in, r.C_out});
  for (const void* p : {r.a, r.d, r.weight}) {
    STD_TORCH_CHECK((uintptr_t)p % 16 == 0,
                    "gpl_fast: a, d and weight must start at a multiple of 16 bytes");
  }
  STD_TORCH_CHECK(r.a_image_stride % 8 == 0 && r.d_image_stride % 8 == 0,
                  "gpl_fast: images of a and d must start at multiples of 16 bytes");
  r.bias = contiguous<float>(bias, "bias", ScalarType::Float, {r.C_out});
  r.from_target = from_target_of(from_target, r.N);
  r.y = pooled(y, "y", r, dtype, r.C_out, r.y_image_stride);
  r.delta = pooled(delta, "delta", r, dtype, r.C_out, r.delta_image_stride);
  r.code = (uint8_t*)pooled(code, "code", r, ScalarType::Byte, r.C_out / 2, r.code_image_stride);
  if (r.N == 0 || r.rows <= 0 || r.W == 0) return;
  const int64_t programs = conv_block_fwd_programs(r.rows, r.W, r.C_out);
  r.partial = contiguous<float>(partial, "partial", ScalarType::Float, {r.N, programs});
  on_current_stream(a, r, cuda::conv_block_fwd);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gpl_fast, CUDA, m) {
  m.impl("conv_block_fwd", TORCH_BOX(&conv_block_fwd));
}
#endif

}  // namespace gpl_fast
