// The operators: schemas, checks and dispatch through LibTorch's stable ABI (torch >= 2.11).
//
// GPL_FAST_CUDA is defined where csrc/cuda is built in, as the text that cuda_build() gives.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <mutex>
#include <stdexcept>
#include <string>

#include "checks.h"

#ifdef GPL_FAST_CUDA
// Weak: a CPU build of torch has no such function, and the library has to load beside it too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device,
                                                                                   void** stream);
#endif

namespace gpl_fast {

void parallel_for(int64_t n, int64_t grain, ParallelBody body, void* ctx) {
  // Torch's stable ABI would say of an exception that there was one, and not which.
  struct Call {
    ParallelBody body;
    void* ctx;
    std::mutex lock;
    std::string error;
  } call = {body, ctx, {}, {}};
  auto caught = [](int64_t begin, int64_t end, void* of) {
    Call& c = *(Call*)of;
    try {
      c.body(begin, end, c.ctx);
    } catch (const std::exception& error) {
      const std::lock_guard<std::mutex> hold(c.lock);
      if (c.error.empty()) c.error = error.what();
    }
  };
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, n, grain, caught, &call));
  if (!call.error.empty()) throw std::runtime_error(call.error);
}

namespace {

// GPL_FAST_RUN: a stage where its tensors are; on a GPU, on that device's current stream.
#ifdef GPL_FAST_CUDA
template <class Args>
void on_current_stream(const Tensor& t, const Args& a, void (*stage)(const Args&, void*)) {
  const auto device = t.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  stage(a, stream);
}
#define GPL_FAST_RUN(stage, t, a) \
  (t).is_cuda() ? on_current_stream(t, a, cuda::stage) : cpu::stage(a)
#else
#define GPL_FAST_RUN(stage, t, a) cpu::stage(a)
#endif

void softmax_pack_fwd(const Tensor& x, int64_t activation, int64_t target_activation,
                      double temperature, int64_t row0, int64_t rows, int64_t core0,
                      int64_t core_rows, double label_smoothing, const MaybeTensor& valid,
                      const MaybeTensor& target, const MaybeTensor& from_target,
                      const MaybeTensor& labels, const MaybeTensor& topk_values,
                      const MaybeTensor& topk_indices, const MaybeTensor& topk_rest,
                      const MaybeTensor& ce_labels, const MaybeTensor& class_weight,
                      const MaybeTensor& y, const MaybeTensor& delta, const MaybeTensor& taken,
                      const MaybeTensor& lse, const MaybeTensor& ce_lse,
                      const MaybeTensor& ce_rows) {
  STD_TORCH_CHECK(x.dim() == 4, "gpl_fast: x must be [N, C, H, W], got ", text(x.sizes()));
  SoftmaxPackFwd a = {};
  a.N = x.size(0), a.C = x.size(1), a.H = x.size(2), a.W = x.size(3);
  a.strip = {row0, rows};
  a.core = {core0, core_rows};
  a.activation = activation_of(activation, "activation");
  a.target_activation = activation_of(target_activation, "target_activation");
  check_temperature(temperature);
  STD_TORCH_CHECK(rows >= 0, "gpl_fast: rows must not be negative, got ", rows);
  const bool own = a.target_activation == Activation::kNone && a.activation != Activation::kNone;
  a.inv_t = inverse_of(temperature), a.target_inv_t = own ? 1.0f : a.inv_t;
  // Times any log sum it is less than half an ulp of float's largest number.
  a.lse_t = (float)std::min(temperature, 0x1p96);
  a.x_dtype = float_dtype(x, "x");
  a.x = x.data_ptr();
  a.x_strides = strides(x);
  const Shape plane = {a.N, a.H, a.W};
  a.valid = contiguous<uint8_t>(valid, "valid", ScalarType::Bool, plane);
  STD_TORCH_CHECK((target ? 1 : 0) + (labels ? 1 : 0) + (topk_values ? 1 : 0) <= 1,
                  "gpl_fast: at most one of target, labels and topk_values");
  if (target) {
    check_shape(*target, "target", {a.N, a.C, a.H, a.W});
    a.target_dtype = float_dtype(*target, "target");
    a.target = target->data_ptr();
    a.target_strides = strides(*target);
  }
  a.labels = contiguous<int64_t>(labels, "labels", ScalarType::Long, plane);
  if (topk_values) {
    STD_TORCH_CHECK(topk_values->dim() == 4, "gpl_fast: topk_values must be [N, k, H, W]");
    STD_TORCH_CHECK(topk_indices, "gpl_fast: topk_values needs topk_indices");
    a.k = topk_values->size(1);
    const Shape list = {a.N, a.k, a.H, a.W};
    a.topk_values = (const float*)planes(*topk_values, "topk_values", ScalarType::Float, list);
    a.topk_indices = (const int64_t*)planes(*topk_indices, "topk_indices", ScalarType::Long, list);
    a.topk_image_stride = topk_values->stride(0), a.topk_stride = topk_values->stride(1);
    STD_TORCH_CHECK(
        topk_indices->stride(0) == a.topk_image_stride && topk_indices->stride(1) == a.topk_stride,
        "gpl_fast: topk_values and topk_indices must have the same strides, got ",
        text(topk_values->strides()), " and ", text(topk_indices->strides()));
    a.topk_rest = contiguous<float>(topk_rest, "topk_rest", ScalarType::Float, plane);
  }
  const bool shared = a.activation == Activation::kSoftmax && temperature == 1.0;
  a.ce = cross_entropy(ce_labels, class_weight, label_smoothing, !shared, a.N, a.C, a.H, a.W);
  STD_TORCH_CHECK(y.has_value() || !(delta || taken), "gpl_fast: delta and taken need y");
  if (y) {
    STD_TORCH_CHECK(y->dim() == 4 && y->size(3) >= a.C,
                    "gpl_fast: y must be [N, rows, W, c_pad] with c_pad >= C = ", a.C, ", got ",
                    text(y->sizes()));
    STD_TORCH_CHECK(delta.has_value() == target.has_value(),
                    "gpl_fast: delta and target go together");
    a.from_target = from_target_of(from_target, a.N);
    STD_TORCH_CHECK(!target || from_target, "gpl_fast: target needs from_target");
    STD_TORCH_CHECK(taken.has_value() == (labels || topk_values),
                    "gpl_fast: taken goes together with labels or topk_values");
    a.c_pad = y->size(3);
    a.dtype = float_dtype(*y, "y");
    const Shape map = {a.N, rows, a.W, a.c_pad};
    a.y_image_stride = image_stride(y, "y", y->scalar_type(), map);
    a.delta_image_stride = image_stride(delta, "delta", y->scalar_type(), map);
    a.y = data(y);
    a.delta = data(delta);
    a.taken = contiguous<uint8_t>(taken, "taken", ScalarType::Byte, {a.N, rows, a.W});
  }
  a.lse = contiguous<float>(lse, "lse", ScalarType::Float, plane);
  a.ce_lse = contiguous<float>(ce_lse, "ce_lse", ScalarType::Float, plane);
  a.ce_rows = contiguous<double>(ce_rows, "ce_rows", ScalarType::Double, {a.N, a.H, 2});
  STD_TORCH_CHECK(!ce_labels || ce_rows, "gpl_fast: ce_labels needs ce_rows");
  if (a.N * a.C * a.W * rows == 0) return;
  cpu::softmax_pack_fwd(a);
}

void label_conv(const MaybeTensor& labels, const MaybeTensor& values, const MaybeTensor& indices,
                const MaybeTensor& rest, const MaybeTensor& valid, const Tensor& table,
                const MaybeTensor& interior, const MaybeTensor& rest_table,
                const Tensor& from_target, const Tensor& taken, int64_t taken_row0, int64_t row0,
                const Tensor& z, const Tensor& dz) {
  LabelConvFwd a = {};
  STD_TORCH_CHECK(z.dim() == 4, "gpl_fast: z must be [N, rows, W, c_out], got ", text(z.sizes()));
  STD_TORCH_CHECK(table.dim() == 3, "gpl_fast: table must be [K * K, C, c_out], got ",
                  text(table.sizes()));
  const Tensor& map = labels ? *labels : *values;
  STD_TORCH_CHECK(
      map.dim() == (labels ? 3 : 4), "gpl_fast: ",
      labels ? "labels must be [N, H, W], got " : "topk_values must be [N, k, H, W], got ",
      text(map.sizes()));
  a.N = map.size(0), a.H = map.size(map.dim() - 2), a.W = map.size(map.dim() - 1);
  a.C = table.size(1), a.c_out = table.size(2);
  while (a.K * a.K < table.size(0)) ++a.K;
  STD_TORCH_CHECK(a.K * a.K == table.size(0) && a.K % 2 == 1,
                  "gpl_fast: table must hold K * K taps, K odd, got ", table.size(0));
  STD_TORCH_CHECK(a.C < INT32_MAX / 2, "gpl_fast: too many classes: ", a.C);
  a.strip = {row0, z.size(1)};
  a.dtype = float_dtype(z, "z");
  const Shape plane = {a.N, a.H, a.W};
  if (labels) {
    a.labels = contiguous<int64_t>(labels, "labels", ScalarType::Long, plane);
    a.interior = contiguous<float>(interior, "interior", ScalarType::Float, {a.C, a.c_out});
  } else {
    a.k = values->size(1);
    const Shape list = {a.N, a.k, a.H, a.W};
    a.topk_values = contiguous<float>(values, "topk_values", ScalarType::Float, list);
    a.topk_indices = contiguous<int64_t>(indices, "topk_indices", ScalarType::Long, list);
    a.topk_rest = contiguous<float>(rest, "topk_rest", ScalarType::Float, plane);
    a.rest_table =
        contiguous<float>(rest_table, "rest_table", ScalarType::Float, {a.K * a.K, a.c_out});
    STD_TORCH_CHECK(!rest || rest_table, "gpl_fast: topk_rest needs rest_table");
  }
  a.valid = contiguous<uint8_t>(valid, "valid", ScalarType::Bool, plane);
  a.table = contiguous(table, "table", z.scalar_type(), {a.K * a.K, a.C, a.c_out});
  STD_TORCH_CHECK(taken.dim() == 3, "gpl_fast: taken must be [N, rows, W], got ",
                  text(taken.sizes()));
  a.taken_strip = {taken_row0, taken.size(1)};
  const int64_t reach = a.K / 2, first = row0 - reach, last = row0 + z.size(1) + reach;
  STD_TORCH_CHECK(taken_row0 <= (first > 0 ? first : 0) &&
                      taken_row0 + taken.size(1) >= (last < a.H ? last : a.H),
                  "gpl_fast: taken must hold the rows of the image from ", first, " to ", last,
                  ", got ", taken.size(1), " from ", taken_row0);
  a.taken = (uint8_t*)contiguous(taken, "taken", ScalarType::Byte, {a.N, a.taken_strip.rows, a.W});
  a.from_target = from_target_of(from_target, a.N);
  const Shape strip = {a.N, z.size(1), a.W, a.c_out};
  a.z_image_stride = image_stride(z, "z", z.scalar_type(), strip);
  a.dz_image_stride = image_stride(dz, "dz", z.scalar_type(), strip);
  a.z = z.data_ptr(), a.dz = dz.data_ptr();
  if (z.numel() == 0) return;
  cpu::label_conv_fwd(a);
}

void label_conv_fwd(const Tensor& labels, const Tensor& table, const Tensor& interior,
                    const Tensor& from_target, const Tensor& taken, int64_t taken_row0,
                    int64_t row0, const Tensor& z, const Tensor& dz, const MaybeTensor& valid) {
  label_conv(labels, {}, {}, {}, valid, table, interior, {}, from_target, taken, taken_row0, row0,
             z, dz);
}

void topk_conv_fwd(const Tensor& values, const Tensor& indices, const Tensor& table,
                   const Tensor& from_target, const Tensor& taken, int64_t taken_row0, int64_t row0,
                   const Tensor& z, const Tensor& dz, const MaybeTensor& rest,
                   const MaybeTensor& rest_table, const MaybeTensor& valid) {
  label_conv({}, values, indices, rest, valid, table, {}, rest_table, from_target, taken,
             taken_row0, row0, z, dz);
}

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
  a.code_image_stride =
      a.pool == Pool::kMax
          ? image_stride(code, "code", ScalarType::Byte, {a.N, a.H / 2, a.W / 2, ceil_div(a.C, 2)})
          : image_stride(code, "code (a mask)", ScalarType::Byte,
                         {a.N, a.H, a.W, ceil_div(a.C, 8)});
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

Tensor diff_reduce_fwd(const Tensor& delta) {
  STD_TORCH_CHECK(delta.dim() >= 1, "gpl_fast: delta must be [N, ...]");
  STD_TORCH_CHECK(delta.is_contiguous(), "gpl_fast: delta must be contiguous");
  DiffReduceFwd a = {};
  a.N = delta.size(0);
  a.M = a.N == 0 ? 0 : delta.numel() / a.N;
  a.dtype = float_dtype(delta, "delta");
  a.delta = delta.data_ptr();
  Tensor sum = torch::stable::new_empty(delta, {a.N}, ScalarType::Double);
  a.sum = (double*)sum.data_ptr();
  if (a.N > 0) cpu::diff_reduce_fwd(a);
  return sum;
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
  a.code_image_stride = a.pool == Pool::kMax
                            ? image_stride(code, "code", ScalarType::Byte,
                                           {a.N, height / 2, width / 2, ceil_div(a.C, 2)})
                            : image_stride(code, "code (a mask)", ScalarType::Byte,
                                           {a.N, height, width, ceil_div(a.C, 8)});
  a.dy = dy.data_ptr(), a.code = (const uint8_t*)code.data_ptr(), a.dz = dz.data_ptr();
  if (dz.numel() == 0) return;
  GPL_FAST_RUN(relu_pool_bwd, dz, a);
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

// fused: what dy would hold is computed in the same kernel.
SoftmaxBwd softmax_bwd_args(const Tensor& x, const MaybeTensor& lse, const MaybeTensor& dy,
                            bool fused, const MaybeTensor& scale, const MaybeTensor& valid,
                            int64_t activation, double temperature, const MaybeTensor& ce_labels,
                            const MaybeTensor& ce_lse, const MaybeTensor& ce_scale,
                            const MaybeTensor& class_weight, double label_smoothing, int64_t row0,
                            int64_t rows, const Tensor& dx) {
  STD_TORCH_CHECK(x.dim() == 4, "gpl_fast: x must be [N, C, H, W], got ", text(x.sizes()));
  check_device(dx, "dx",
               {{"x", x},
                {"lse", lse},
                {"dy", dy},
                {"scale", scale},
                {"valid", valid},
                {"ce_labels", ce_labels},
                {"ce_lse", ce_lse},
                {"ce_scale", ce_scale},
                {"class_weight", class_weight}});
  SoftmaxBwd a = {};
  a.N = x.size(0), a.C = x.size(1), a.H = x.size(2), a.W = x.size(3);
  a.strip = {row0, rows};
  a.activation = activation_of(activation, "activation");
  check_temperature(temperature);
  STD_TORCH_CHECK(rows >= 0, "gpl_fast: rows must not be negative, got ", rows);
  STD_TORCH_CHECK(fused || dy || ce_labels, "gpl_fast: softmax_bwd needs dy or ce_labels");
  a.inv_t = inverse_of(temperature);
  a.x_dtype = float_dtype(x, "x");
  a.x = x.data_ptr();
  a.x_strides = strides(x);
  check_shape(dx, "dx", {a.N, a.C, a.H, a.W});
  check_dtype(dx, "dx", x.scalar_type());
  a.dx = dx.data_ptr();
  a.dx_strides = strides(dx);
  const Shape plane = {a.N, a.H, a.W};
  a.lse = contiguous<float>(lse, "lse", ScalarType::Float, plane);
  a.valid = contiguous<uint8_t>(valid, "valid", ScalarType::Bool, plane);
  if (dy) {
    STD_TORCH_CHECK(dy->dim() == 4 && dy->size(3) >= a.C,
                    "gpl_fast: dy must be [N, rows, W, c_pad] with c_pad >= C = ", a.C, ", got ",
                    text(dy->sizes()));
    a.c_pad = dy->size(3);
    a.dtype = float_dtype(*dy, "dy");
    a.dy_image_stride = image_stride(dy, "dy", dy->scalar_type(), {a.N, rows, a.W, a.c_pad});
    a.dy = dy->data_ptr();
  }
  if (dy || fused) {
    STD_TORCH_CHECK(scale, "gpl_fast: dy needs scale");
    STD_TORCH_CHECK(a.activation != Activation::kSoftmax || lse, "gpl_fast: softmax needs lse");
    a.scale = contiguous<float>(scale, "scale", ScalarType::Float, {a.N});
  }
  const bool shared = a.activation == Activation::kSoftmax && temperature == 1.0;
  a.ce = cross_entropy(ce_labels, class_weight, label_smoothing, !shared, a.N, a.C, a.H, a.W);
  a.ce_lse = contiguous<float>(ce_lse, "ce_lse", ScalarType::Float, plane);
  a.ce_scale = contiguous<float>(ce_scale, "ce_scale", ScalarType::Float, {a.N});
  if (ce_labels) {
    STD_TORCH_CHECK(ce_scale, "gpl_fast: ce_labels needs ce_scale");
    if (shared) a.ce_lse = a.lse;
    STD_TORCH_CHECK(a.ce_lse, "gpl_fast: ce_labels needs ce_lse",
                    " (lse where softmax has temperature 1)");
  }
  return a;
}

void softmax_bwd(const Tensor& x, int64_t activation, double temperature, int64_t row0,
                 int64_t rows, const Tensor& dx, double label_smoothing, const MaybeTensor& lse,
                 const MaybeTensor& dy, const MaybeTensor& scale, const MaybeTensor& valid,
                 const MaybeTensor& ce_labels, const MaybeTensor& ce_lse,
                 const MaybeTensor& ce_scale, const MaybeTensor& class_weight) {
  const SoftmaxBwd a =
      softmax_bwd_args(x, lse, dy, false, scale, valid, activation, temperature, ce_labels, ce_lse,
                       ce_scale, class_weight, label_smoothing, row0, rows, dx);
  if (a.N * a.C * a.W * rows == 0) return;
  GPL_FAST_RUN(softmax_bwd, dx, a);
}

#ifdef GPL_FAST_CUDA
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
  a.code_image_stride = a.pool == Pool::kMax
                            ? image_stride(code, "code", ScalarType::Byte,
                                           {a.N, conv_h / 2, conv_w / 2, ceil_div(a.C_out, 2)})
                            : image_stride(code, "code (a mask)", ScalarType::Byte,
                                           {a.N, conv_h, conv_w, ceil_div(a.C_out, 8)});
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
                           const MaybeTensor& ce_labels, const MaybeTensor& ce_lse,
                           const MaybeTensor& ce_scale, const MaybeTensor& class_weight) {
  const SoftmaxBwd logits =
      softmax_bwd_args(x, lse, {}, true, scale, valid, activation, temperature, ce_labels, ce_lse,
                       ce_scale, class_weight, label_smoothing, row0, rows, dx);
  check_device(dx, "dx", {{"dy", dy}, {"code", code}, {"w", w}});
  ConvBlockBwd a = conv_block_args(dy, code, w, pool, stride, dy_row0, allow_tf32, logits.H,
                                   logits.W, logits.C, {row0, rows});
  STD_TORCH_CHECK(a.N == logits.N, "gpl_fast: dy must have the images of x, ", logits.N, ", got ",
                  a.N);
  a.logits = &logits;
  if (logits.N * logits.C * logits.W * rows == 0) return;
  on_current_stream(dx, a, cuda::conv_block_bwd);
}
#endif

void populate(const Tensor& t) {
  int64_t reach = t.numel() == 0 ? 0 : 1;
  for (int64_t i = 0; i < t.dim(); ++i) reach += (t.size(i) - 1) * t.stride(i);
  STD_TORCH_CHECK(t.numel() == 0 || reach == t.numel(),
                  "gpl_fast: t must be dense in memory, strides ", text(t.strides()));
  cpu::populate(t.data_ptr(), t.numel() * t.element_size());
}

std::string cpu_bfloat16() {
  const char* const names[] = {"none", "pairs", "matrix"};
  return names[(int)cpu::bfloat16_unit()];
}

std::string cpu_capability() { return cpu::capability(); }

std::string cuda_build() {
#ifdef GPL_FAST_CUDA
  return GPL_FAST_CUDA;
#else
  return "";
#endif
}

}  // namespace
}  // namespace gpl_fast

STABLE_TORCH_LIBRARY(gpl_fast, m) {
  m.def(
      "softmax_pack_fwd(Tensor x, int activation, int target_activation, float temperature, "
      "int row0, int rows, int core0, int core_rows, float label_smoothing=0.0, "
      "Tensor? valid=None, Tensor? target=None, Tensor? from_target=None, Tensor? labels=None, "
      "Tensor? topk_values=None, Tensor? topk_indices=None, Tensor? topk_rest=None, "
      "Tensor? ce_labels=None, Tensor? class_weight=None, Tensor(a!)? y=None, "
      "Tensor(b!)? delta=None, Tensor(c!)? taken=None, Tensor(d!)? lse=None, "
      "Tensor(e!)? ce_lse=None, Tensor(f!)? ce_rows=None) -> ()");
  m.def(
      "label_conv_fwd(Tensor labels, Tensor table, Tensor interior, Tensor from_target, "
      "Tensor taken, int taken_row0, int row0, Tensor(a!) z, Tensor(b!) dz, "
      "Tensor? valid=None) -> ()");
  m.def(
      "topk_conv_fwd(Tensor topk_values, Tensor topk_indices, Tensor table, Tensor from_target, "
      "Tensor taken, int taken_row0, int row0, Tensor(a!) z, Tensor(b!) dz, "
      "Tensor? topk_rest=None, Tensor? rest_table=None, Tensor? valid=None) -> ()");
  m.def("relu_fwd(Tensor z, Tensor(a!) y, Tensor(b!)? mask=None) -> ()");
  m.def(
      "relu_diff_fwd(Tensor z, Tensor dz, Tensor from_target, Tensor(a!) delta, "
      "Tensor(b!)? y=None, Tensor(c!)? mask=None) -> ()");
  m.def("relu_pool_fwd(Tensor z, int pool, Tensor(a!) y, Tensor(b!)? code=None) -> ()");
  m.def(
      "relu_pool_diff_fwd(Tensor z, Tensor dz, Tensor from_target, int pool, Tensor(a!) delta, "
      "Tensor(b!)? y=None, Tensor(c!)? code=None) -> ()");
  m.def("diff_reduce_fwd(Tensor delta) -> Tensor");
  m.def(
      "relu_pool_bwd(Tensor dy, Tensor code, int pool, int height, int width, int row0, "
      "Tensor(a!) dz) -> ()");
  m.def("relu_bwd(Tensor dy, Tensor mask, Tensor(a!) dz) -> ()");
  m.def(
      "softmax_bwd(Tensor x, int activation, float temperature, int row0, int rows, "
      "Tensor(a!) dx, float label_smoothing=0.0, Tensor? lse=None, Tensor? dy=None, "
      "Tensor? scale=None, Tensor? valid=None, Tensor? ce_labels=None, Tensor? ce_lse=None, "
      "Tensor? ce_scale=None, Tensor? class_weight=None) -> ()");
  m.def(
      "conv_block_bwd(Tensor dy, Tensor w, int pool, int stride, int dy_row0, bool allow_tf32, "
      "int height, int row0, Tensor(a!) dx, Tensor? code=None) -> ()");
  m.def(
      "conv_block_logits_bwd(Tensor dy, Tensor w, int pool, int stride, int dy_row0, "
      "bool allow_tf32, Tensor x, Tensor scale, int activation, float temperature, int row0, "
      "int rows, Tensor(a!) dx, float label_smoothing=0.0, Tensor? code=None, Tensor? lse=None, "
      "Tensor? valid=None, Tensor? ce_labels=None, Tensor? ce_lse=None, Tensor? ce_scale=None, "
      "Tensor? class_weight=None) -> ()");
  m.def("populate(Tensor(a!) t) -> ()");
  m.def("cpu_capability() -> str");
  m.def("cpu_bfloat16() -> str");
  m.def("cuda_build() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(gpl_fast, CPU, m) {
  m.impl("softmax_pack_fwd", TORCH_BOX(&gpl_fast::softmax_pack_fwd));
  m.impl("label_conv_fwd", TORCH_BOX(&gpl_fast::label_conv_fwd));
  m.impl("topk_conv_fwd", TORCH_BOX(&gpl_fast::topk_conv_fwd));
  m.impl("relu_fwd", TORCH_BOX(&gpl_fast::relu_fwd));
  m.impl("relu_diff_fwd", TORCH_BOX(&gpl_fast::relu_diff_fwd));
  m.impl("relu_pool_fwd", TORCH_BOX(&gpl_fast::relu_pool_fwd));
  m.impl("relu_pool_diff_fwd", TORCH_BOX(&gpl_fast::relu_pool_diff_fwd));
  m.impl("diff_reduce_fwd", TORCH_BOX(&gpl_fast::diff_reduce_fwd));
  m.impl("relu_pool_bwd", TORCH_BOX(&gpl_fast::relu_pool_bwd));
  m.impl("relu_bwd", TORCH_BOX(&gpl_fast::relu_bwd));
  m.impl("softmax_bwd", TORCH_BOX(&gpl_fast::softmax_bwd));
  m.impl("populate", TORCH_BOX(&gpl_fast::populate));
}

#ifdef GPL_FAST_CUDA
STABLE_TORCH_LIBRARY_IMPL(gpl_fast, CUDA, m) {
  m.impl("relu_pool_bwd", TORCH_BOX(&gpl_fast::relu_pool_bwd));
  m.impl("relu_bwd", TORCH_BOX(&gpl_fast::relu_bwd));
  m.impl("softmax_bwd", TORCH_BOX(&gpl_fast::softmax_bwd));
  m.impl("conv_block_bwd", TORCH_BOX(&gpl_fast::conv_block_bwd));
  m.impl("conv_block_logits_bwd", TORCH_BOX(&gpl_fast::conv_block_logits_bwd));
}
#endif

STABLE_TORCH_LIBRARY_IMPL(gpl_fast, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&gpl_fast::cpu_capability));
  m.impl("cpu_bfloat16", TORCH_BOX(&gpl_fast::cpu_bfloat16));
  m.impl("cuda_build", TORCH_BOX(&gpl_fast::cuda_build));
}
