// The kernels of csrc/cuda as a Python module of addresses and numbers, as they run on the CPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda_on_cpu.h"
#include "stages.h"

namespace py = pybind11;
using namespace gpl_fast;

namespace {

template <class T>
T take(const py::dict& d, const char* name, T otherwise = {}) {
  if (!d.contains(name) || d[name].is_none()) return otherwise;
  if constexpr (std::is_pointer_v<T>) {
    return (T)d[name].cast<uintptr_t>();
  } else if constexpr (std::is_enum_v<T>) {
    return (T)d[name].cast<int>();
  } else {
    return d[name].cast<T>();
  }
}

Strides strides(const py::dict& d, const char* name) {
  auto s = d[name].cast<std::array<int64_t, 4>>();
  return {s[0], s[1], s[2], s[3]};
}

Strip strip(const py::dict& d, const char* name) {
  auto s = d[name].cast<std::pair<int64_t, int64_t>>();
  return {s.first, s.second};
}

SoftmaxBwd logits_of(const py::dict& d, const ConvBlockBwd& conv) {
  SoftmaxBwd a = {};
  a.N = conv.N, a.C = conv.C_in, a.H = conv.H, a.W = conv.W;
  a.strip = conv.strip;
  a.activation = take<Activation>(d, "activation");
  a.inv_t = inverse_of(take<double>(d, "temperature", 1.0));
  a.x_dtype = take<DType>(d, "x_dtype");
  a.x = take<const void*>(d, "x");
  a.x_strides = strides(d, "x_strides");
  a.lse = take<const float*>(d, "lse");
  a.scale = take<const float*>(d, "scale");
  a.valid = take<const uint8_t*>(d, "valid");
  a.ce.labels = take<const int64_t*>(d, "ce_labels");
  a.ce.class_weight = take<const float*>(d, "class_weight");
  a.ce.label_smoothing = take<float>(d, "label_smoothing");
  a.ce.own_lse = take<bool>(d, "own_lse");
  a.ce_lse = take<const float*>(d, "ce_lse");
  a.ce_scale = take<const float*>(d, "ce_scale");
  a.dx = take<void*>(d, "dx");
  a.dx_strides = strides(d, "dx_strides");
  return a;
}

void conv_block_bwd(const py::dict& d) {
  ConvBlockBwd a = {};
  a.N = take<int64_t>(d, "N"), a.H = take<int64_t>(d, "H"), a.W = take<int64_t>(d, "W");
  a.C_in = take<int64_t>(d, "C_in"), a.C_out = take<int64_t>(d, "C_out");
  a.K = take<int64_t>(d, "K"), a.stride = take<int64_t>(d, "stride");
  a.strip = strip(d, "strip"), a.dy_strip = strip(d, "dy_strip");
  a.pool = take<Pool>(d, "pool");
  a.dtype = take<DType>(d, "dtype");
  a.allow_tf32 = take<bool>(d, "allow_tf32");
  a.dy = take<const void*>(d, "dy");
  a.code = take<const uint8_t*>(d, "code");
  a.w = take<const void*>(d, "w");
  a.dy_image_stride = take<int64_t>(d, "dy_image_stride");
  a.code_image_stride = take<int64_t>(d, "code_image_stride");
  SoftmaxBwd logits;
  if (d.contains("logits")) {
    logits = logits_of(d["logits"], a);
    a.logits = &logits;
  } else {
    a.dx = take<void*>(d, "dx");
    a.dx_image_stride = take<int64_t>(d, "dx_image_stride");
  }
  cuda::conv_block_bwd(a, nullptr);
}

py::dict counters() {
  const cudacpu::Counters& t = cudacpu::total;
  py::dict d;
  d["mma"] = t.mma, d["ldmatrix"] = t.ldmatrix, d["ldmatrix_phases"] = t.ldmatrix_phases;
  d["cp_async"] = t.cp_async, d["tma"] = t.tma, d["barriers"] = t.barriers;
  d["shared"] = t.shared, d["shared_phases"] = t.shared_phases;
  d["dynamic_shared_bytes"] = cudacpu::dynamic_shared;
  return d;
}

void play(int capability, size_t shared_kib) {
  cudacpu::played_capability = capability;
  cudacpu::shared_limit = shared_kib << 10;
}

}  // namespace

PYBIND11_MODULE(kernels, m) {
  m.def("conv_block_bwd", &conv_block_bwd);
  m.def("counters", &counters, "Of the last launch.");
  m.def(
      "count_shared", [](bool on) { cudacpu::counts_shared = on; },
      "Whether accesses to shared memory are counted, which takes a while.");
  m.def("play", &play, "The GPU whose limits are played: capability and KiB of shared memory.");
}
