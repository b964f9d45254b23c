// The way back through 2x2 pooling and ReLU: a thread writes the four positions of a window.
#include "element.cuh"

namespace gpl_fast::cuda {
namespace {

// The codes of kVec channels from c on, the first one's in the lowest bits.
template <int kVec>
__device__ __forceinline__ uint32_t load_codes(const uint8_t* pixel, int64_t c) {
  if constexpr (kVec == 8) return *(const uint32_t*)(pixel + c / 2);
  if constexpr (kVec == 4) return *(const uint16_t*)(pixel + c / 2);
  return (uint32_t)pixel[c / 2] >> (c % 2 * 4);
}

// dz[2i+p, 2j+q] = dy[i, j] where (p, q) won, a quarter of it where it was positive (avg)    (3)
// Windows cut off by the image's or the strip's border count too: what is there gets zeros.
template <class T, int kVec, bool kMax>
__global__ void __launch_bounds__(kThreads)
    relu_pool_bwd_kernel(ReluPoolBwd a, int64_t first_row, int64_t window_rows, unsigned chunks) {
  const unsigned pieces = (unsigned)(a.C / kVec);
  const unsigned item = blockIdx.x % chunks * kThreads + threadIdx.x;
  const unsigned j = item / pieces;
  if (j >= (a.W + 1) / 2) return;
  const int64_t c = (int64_t)(item - j * pieces) * kVec;
  const int64_t row = blockIdx.x / chunks, n = row / window_rows, i = first_row + row % window_rows;
  const int64_t h = a.H / 2, w = a.W / 2;
  const bool live = i >= 0 && i < h && j < w;

  Vec<T, kVec> g = {};
  uint32_t codes = 0;
  if (live) {
    g = *(const Vec<T, kVec>*)((const T*)a.dy + n * a.dy_image_stride + (i * w + j) * a.C + c);
    if constexpr (kMax) {
      codes = load_codes<kVec>(a.code + n * a.code_image_stride + (i * w + j) * ((a.C + 1) / 2), c);
    } else {
#pragma unroll
      for (int e = 0; e < kVec; ++e) g.v[e] = narrow<T>(widen(g.v[e]) * 0.25f);
    }
  }
#pragma unroll
  for (int position = 0; position < 4; ++position) {
    const int64_t y = 2 * i + position / 2, x = 2 * (int64_t)j + position % 2;
    const int64_t r = y - a.strip.row0;
    if (r < 0 || r >= a.strip.rows || x >= a.W) continue;
    uint32_t mask = 0;
    if (!kMax && live) {
      mask = a.code[n * a.code_image_stride + (y * a.W + x) * ((a.C + 7) / 8) + c / 8] >> (c % 8);
    }
    Vec<T, kVec> out = {};
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      const bool on = kMax ? live && (codes >> 4 * e & 15) == (uint32_t)position : mask >> e & 1;
      if (on) out.v[e] = g.v[e];
    }
    *(Vec<T, kVec>*)((T*)a.dz + n * a.dz_image_stride + (r * a.W + x) * a.C + c) = out;
  }
}

template <class T, int kVec>
void launch(const ReluPoolBwd& a, cudaStream_t stream) {
  const int64_t first = a.strip.row0 >> 1, last = (a.strip.row0 + a.strip.rows - 1) >> 1;
  const int64_t rows = last - first + 1;
  const int64_t chunks = ceil_div((a.W + 1) / 2 * (a.C / kVec), kThreads);
  const dim3 grid = grid_of("relu_pool_bwd", a.N * rows * chunks);
  if (a.pool == Pool::kMax) {
    LAUNCH((relu_pool_bwd_kernel<T, kVec, true>), grid, dim3(kThreads), 0, stream, a, first, rows,
           (unsigned)chunks);
  } else {
    LAUNCH((relu_pool_bwd_kernel<T, kVec, false>), grid, dim3(kThreads), 0, stream, a, first, rows,
           (unsigned)chunks);
  }
  check_launch("relu_pool_bwd");
}

// Whether pieces of kVec channels start where a vector may.
template <class T, int kVec>
bool in_pieces(const ReluPoolBwd& a) {
  const bool codes =
      a.pool == Pool::kAvg || (aligned(a.code, kVec / 2) && a.code_image_stride % (kVec / 2) == 0);
  return a.C % kVec == 0 && aligned(a.dy, 16) && aligned(a.dz, 16) &&
         a.dy_image_stride % kVec == 0 && a.dz_image_stride % kVec == 0 && codes;
}

}  // namespace

void relu_pool_bwd(const ReluPoolBwd& a, void* stream) {
  if (a.N * a.strip.rows * a.W * a.C == 0) return;
  with_dtype(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    constexpr int kVec = 16 / sizeof(T);
    if (in_pieces<T, kVec>(a)) {
      launch<T, kVec>(a, (cudaStream_t)stream);
    } else {
      launch<T, 1>(a, (cudaStream_t)stream);
    }
  });
}

}  // namespace gpl_fast::cuda
