// ReLU's gradient from its 1-bit mask. dz may be dy itself.
#include "element.cuh"

namespace gpl_fast::cuda {
namespace {

// C a multiple of 8: byte i of the mask belongs to elements [8 i, 8 i + 8).
template <class Bits>
__global__ void __launch_bounds__(kThreads)
    relu_bwd_packed_kernel(const Vec<Bits, 8>* dy,  // [pixels * C / 8]
                           const uint8_t* mask,     // [pixels * C / 8]
                           Vec<Bits, 8>* dz,        // [pixels * C / 8]
                           int64_t count) {
  const int64_t i = (int64_t)blockIdx.x * kThreads + threadIdx.x;
  if (i >= count) return;
  Vec<Bits, 8> g = dy[i];
  const uint32_t on = mask[i];
#pragma unroll
  for (int e = 0; e < 8; ++e) g.v[e] = on >> e & 1 ? g.v[e] : Bits(0);
  dz[i] = g;
}

template <class Bits>
__global__ void __launch_bounds__(kThreads)
    relu_bwd_kernel(const Bits* dy,       // [pixels, C]
                    const uint8_t* mask,  // [pixels, ceil(C / 8)]
                    Bits* dz,             // [pixels, C]
                    int64_t count, int64_t C) {
  const int64_t i = (int64_t)blockIdx.x * kThreads + threadIdx.x;
  if (i >= count) return;
  const int64_t px = i / C, c = i - px * C;
  const uint32_t on = mask[px * ((C + 7) / 8) + c / 8];
  dz[i] = on >> (c % 8) & 1 ? dy[i] : Bits(0);
}

template <class Bits>
void launch(const ReluBwd& a, cudaStream_t stream) {
  const int64_t count = a.pixels * a.C;
  const bool packed = a.C % 8 == 0 && aligned(a.dy, 16) && aligned(a.dz, 16);
  const int64_t items = packed ? count / 8 : count;
  const dim3 grid = grid_of("relu_bwd", ceil_div(items, kThreads));
  if (packed) {
    LAUNCH(relu_bwd_packed_kernel<Bits>, grid, dim3(kThreads), 0, stream, (const Vec<Bits, 8>*)a.dy,
           a.mask, (Vec<Bits, 8>*)a.dz, items);
  } else {
    LAUNCH(relu_bwd_kernel<Bits>, grid, dim3(kThreads), 0, stream, (const Bits*)a.dy, a.mask,
           (Bits*)a.dz, items, a.C);
  }
  check_launch("relu_bwd");
}

}  // namespace

void relu_bwd(const ReluBwd& a, void* stream) {
  if (a.pixels * a.C == 0) return;
  if (a.dtype == DType::kFloat32) {
    launch<uint32_t>(a, (cudaStream_t)stream);
  } else {
    launch<uint16_t>(a, (cudaStream_t)stream);
  }
}

}  // namespace gpl_fast::cuda
