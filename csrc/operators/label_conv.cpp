// The first convolution of a listed target, looked up in its weights: of labels, and of top-k
// lists.
#include "dispatch.h"

namespace gpl_fast {

STABLE_TORCH_LIBRARY_FRAGMENT(gpl_fast, m) {
  m.def(
      "label_conv_fwd(Tensor labels, Tensor table, Tensor interior, Tensor from_target, "
      "Tensor taken, int taken_row0, int row0, Tensor(a!) z, Tensor(b!) dz, "
      "Tensor? valid=None) -> ()");
  m.def(
      "topk_conv_fwd(Tensor topk_values, Tensor topk_indices, Tensor table, Tensor from_target, "
      "Tensor taken, int taken_row0, int row0, Tensor(a!) z, Tensor(b!) dz, "
      "Tensor? topk_rest=None, Tensor? rest_table=None, Tensor? valid=None) -> ()");
}

namespace {

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
  a.valid = valid_of(valid, plane);
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gpl_fast, CPU, m) {
  m.impl("label_conv_fwd", TORCH_BOX(&label_conv_fwd));
  m.impl("topk_conv_fwd", TORCH_BOX(&topk_conv_fwd));
}

}  // namespace gpl_fast
