// The net's gradient, NHWC -> the logits' gradient in the caller's layout; the cross-entropy's
// gradient goes into the same write. y' is computed again from x and lse.
//
// A block takes 32 pixels of a row. Where all channels fit into shared memory everything is read
// once; else the channels come in chunks, twice: for the sums, then, backwards, for the gradient.
#include "logits_gradient.cuh"

namespace gpl_fast::cuda {
namespace {

constexpr int kPixels = 32, kGroups = kThreads / kPixels;
constexpr int64_t kTileBytes = 40 << 10;  // with the reductions less than the 48 KiB of every GPU

// [kPixels][channels] in shared memory. Pixels lie an odd number of words apart, so that neither
// lanes along the pixels nor lanes along the channels meet in a bank.
template <class T>
struct Tile {
  T* at;
  int stride;

  __device__ T& operator()(int p, int c) const { return at[p * stride + c]; }
};

__host__ __device__ inline int64_t tile_words(int64_t channels, int64_t element) {
  return (channels * element + 3) / 4 | 1;
}

// A tile's place in global memory, at its first pixel and channel; strides in elements.
template <class T>
struct Place {
  T* at;
  int64_t pixel, channel;
};

template <bool kIn, class T, int kVec>
__device__ __forceinline__ void move_along_channels(const Tile<T>& tile, const Place<T>& place,
                                                    int channels, int pixels) {
  const int pieces = channels / kVec;
#pragma unroll 2
  for (int i = threadIdx.x; i < pieces * pixels; i += kThreads) {
    const int p = i / pieces, c = (i - p * pieces) * kVec;
    auto* inner = (Vec<T, kVec>*)&tile(p, c);
    auto* outer = (Vec<T, kVec>*)(place.at + p * place.pixel + c);
    if (kIn) {
      *inner = *outer;
    } else {
      *outer = *inner;
    }
  }
}

template <bool kIn, class T, int kVec>
__device__ __forceinline__ void move_along_pixels(const Tile<T>& tile, const Place<T>& place,
                                                  int channels, int pixels) {
  constexpr int kPieces = kPixels / kVec;
#pragma unroll 2
  for (int i = threadIdx.x; i < channels * kPieces; i += kThreads) {
    const int c = i / kPieces, p = i % kPieces * kVec;
    if (p >= pixels) continue;
    auto* outer = (Vec<T, kVec>*)(place.at + c * place.channel + p * place.pixel);
    Vec<T, kVec> v;
    if (kIn) v = *outer;
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      if (kIn) {
        tile(p + e, c) = v.v[e];
      } else {
        v.v[e] = tile(p + e, c);
      }
    }
    if (!kIn) *outer = v;
  }
}

// Fills the tile (kIn) or writes it, with neighbouring lanes at neighbouring addresses.
template <bool kIn, class T>
__device__ void move(const Tile<T>& tile, const Place<T>& place, int channels, int pixels) {
  constexpr int kWord = 4 / sizeof(T), kVec = 16 / sizeof(T);
  const uintptr_t at = (uintptr_t)place.at;
  if (place.channel == 1) {
    if (channels % kWord == 0 && place.pixel % kWord == 0 && at % 4 == 0) {
      move_along_channels<kIn, T, kWord>(tile, place, channels, pixels);
    } else {
      move_along_channels<kIn, T, 1>(tile, place, channels, pixels);
    }
  } else if (place.pixel == 1 && place.channel % kVec == 0 && at % 16 == 0 && pixels == kPixels) {
    move_along_pixels<kIn, T, kVec>(tile, place, channels, pixels);
  } else {
    move_along_pixels<kIn, T, 1>(tile, place, channels, pixels);
  }
}

// sum of the class weights, in an order of its own; partial: [kThreads] in shared memory
__device__ float class_weight_sum(const CrossEntropy& ce, int64_t C, double* partial) {
  if (!ce.class_weight || ce.label_smoothing == 0.0f) return (float)C;
  double sum = 0.0;
  for (int64_t c = threadIdx.x; c < C; c += kThreads) sum += (double)ce.class_weight[c];
  partial[threadIdx.x] = sum;
  __syncthreads();
  for (int step = kThreads / 2; step > 0; step /= 2) {
    if ((int)threadIdx.x < step) partial[threadIdx.x] += partial[threadIdx.x + step];
    __syncthreads();
  }
  return (float)partial[0];
}

// X: of x and dx; D: of dy.
template <class X, class D>
__global__ void __launch_bounds__(kThreads, 3)
    softmax_bwd_kernel(SoftmaxBwd a, int64_t tiles, int chunk, int chunks) {
  DYN_SMEM(shared);
  __shared__ float partial[3][kGroups][kPixels];
  __shared__ double weight_partial[kThreads];
  const int64_t row = blockIdx.x / tiles, n = row / a.strip.rows, r = row % a.strip.rows;
  const int64_t h = a.strip.row0 + r, w0 = blockIdx.x % tiles * kPixels;
  if (h < 0 || h >= a.H) return;
  const int pixels = a.W - w0 < kPixels ? (int)(a.W - w0) : kPixels;
  const int p = threadIdx.x % kPixels, group = threadIdx.x / kPixels;
  const bool inside = p < pixels;
  const int64_t px = (n * a.H + h) * a.W + w0 + p;

  const int64_t x_words = tile_words(chunk, sizeof(X)), dy_words = tile_words(chunk, sizeof(D));
  const Tile<X> x = {(X*)shared, (int)(x_words * 4 / sizeof(X))};
  const Tile<D> dy = {(D*)(shared + kPixels * x_words * 4), (int)(dy_words * 4 / sizeof(D))};
  auto length = [&](int i) {
    return a.C - (int64_t)i * chunk < chunk ? (int)(a.C - (int64_t)i * chunk) : chunk;
  };
  auto load = [&](int i) {
    const Strides& s = a.x_strides;
    const X* src = (const X*)a.x + n * s.n + h * s.h + w0 * s.w + (int64_t)i * chunk * s.c;
    move<true>(x, Place<X>{const_cast<X*>(src), s.w, s.c}, length(i), pixels);
    if (!a.dy) return;
    const D* from =
        (const D*)a.dy + n * a.dy_image_stride + (r * a.W + w0) * a.c_pad + (int64_t)i * chunk;
    move<true>(dy, Place<D>{const_cast<D*>(from), a.c_pad, 1}, length(i), pixels);
  };

  const bool softmax = a.dy && a.activation == Activation::kSoftmax;
  const bool ce = a.ce.labels, own = ce && !(a.dy && !a.ce.own_lse);
  const float inv_t = a.inv_t;
  const float lse = softmax && inside ? a.lse[px] : 0.0f, ce_lse = own && inside ? a.ce_lse[px] : 0;

  // (1) sum y', sum y' dy and the cross-entropy's sum
  LogitsSums sums = {};
  for (int i = 0; i < chunks; ++i) {
    if (i) __syncthreads();
    load(i);
    __syncthreads();
    for (int c = group; inside && c < length(i); c += kGroups) {
      const float v = widen(x(p, c));
      if (softmax) sums.add(exponential(v, lse, inv_t), widen(dy(p, c)));
      if (own) sums.p += exponential(v, ce_lse);
    }
  }
  partial[0][group][p] = sums.y;
  partial[1][group][p] = sums.y_dy;
  partial[2][group][p] = sums.p;
  __syncthreads();
  sums = {};
#pragma unroll
  for (int k = 0; k < kGroups; ++k) {
    sums.y += partial[0][k][p];
    sums.y_dy += partial[1][k][p];
    sums.p += partial[2][k][p];
  }
  const float inverse = 1.0f / sums.y, own_inverse = 1.0f / sums.p, y_dy = sums.y_dy * inverse;

  // (2) the gradient, from the last chunk, which is still there, to the first
  const float weights = ce ? class_weight_sum(a.ce, a.C, weight_partial) : 0.0f;
  const bool keep = a.dy && inside && (!a.valid || a.valid[px]);
  const ActivationGradient activation = {a.activation, inv_t, a.dy ? a.scale[n] : 0.0f};
  for (int i = chunks - 1; i >= 0; --i) {
    if (i < chunks - 1) {
      __syncthreads();
      load(i);
      __syncthreads();
    }
    if (inside) {
      auto y_of = [&](float v) { return softmax ? exponential(v, lse, inv_t) * inverse : 0.0f; };
      auto gradient = [&](int c, float v, float y) {
        return keep ? activation.at(v, y, y_dy, widen(dy(p, c))) : 0.0f;
      };
      if (ce) {
        const CrossEntropyGradient<int64_t> cross_entropy(a, n, px, weights);
        for (int c = group; c < length(i); c += kGroups) {
          const float v = widen(x(p, c)), y = y_of(v);
          const float probability = own ? exponential(v, ce_lse) * own_inverse : y;
          x(p, c) = narrow<X>(gradient(c, v, y) +
                              cross_entropy.at(a.ce, probability, (int64_t)i * chunk + c));
        }
      } else {
        for (int c = group; c < length(i); c += kGroups) {
          const float v = widen(x(p, c));
          x(p, c) = narrow<X>(gradient(c, v, y_of(v)));
        }
      }
    }
    __syncthreads();
    const Strides& s = a.dx_strides;
    X* dst = (X*)a.dx + n * s.n + h * s.h + w0 * s.w + (int64_t)i * chunk * s.c;
    move<false>(x, Place<X>{dst, s.w, s.c}, length(i), pixels);
  }
}

template <class X, class D>
void launch(const SoftmaxBwd& a, cudaStream_t stream) {
  // A chunk is a multiple of 8 channels, so that what follows it starts where a vector may.
  const int64_t dy_element = a.dy ? sizeof(D) : 0;
  int64_t chunk = a.C;
  auto bytes = [&] {
    return kPixels * 4 * (tile_words(chunk, sizeof(X)) + tile_words(chunk, dy_element));
  };
  if (bytes() > kTileBytes) {
    chunk = kTileBytes / (kPixels * (int64_t)(sizeof(X) + dy_element)) / 8 * 8 - 8;
  }
  const int64_t tiles = ceil_div(a.W, kPixels);
  const dim3 grid = grid_of("softmax_bwd", a.N * a.strip.rows * tiles);
  LAUNCH((softmax_bwd_kernel<X, D>), grid, dim3(kThreads), (size_t)bytes(), stream, a, tiles,
         (int)chunk, (int)ceil_div(a.C, chunk));
  check_launch("softmax_bwd");
}

}  // namespace

void softmax_bwd(const SoftmaxBwd& a, void* stream) {
  if (a.N * a.C * a.W * a.strip.rows == 0) return;
  with_dtype(a.x_dtype, [&](auto x) {
    with_dtype(a.dy ? a.dtype : DType::kFloat32,
               [&](auto d) { launch<decltype(x), decltype(d)>(a, (cudaStream_t)stream); });
  });
}

}  // namespace gpl_fast::cuda
