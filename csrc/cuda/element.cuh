// What the elementwise kernels share: where they run, element types, vectors, the check of a
// launch.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef CUDA_ON_CPU
#include "cuda_on_cpu.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include "../stages.h"

#ifndef LAUNCH
#define DYN_SMEM(name) extern __shared__ __align__(1024) unsigned char name[]
#define LAUNCH(kernel, grid, block, smem, stream, ...) \
  kernel<<<grid, block, smem, stream>>>(__VA_ARGS__)
#endif

namespace gpl_fast::cuda {

constexpr int kThreads = 256;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T narrow(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

// 2^x to two units in the last place, 0 below 2^-126; one instruction.
__device__ __forceinline__ float exp2_approx(float x) {
#ifdef CUDA_ON_CPU
  return std::exp2(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// kVec neighbouring elements, moved as one piece of at most 16 bytes where T and kVec allow it.
template <class T, int kVec>
struct alignas(kVec * sizeof(T) < 16 ? kVec * sizeof(T) : 16) Vec {
  T v[kVec];
};

inline bool aligned(const void* p, int64_t bytes) { return (uintptr_t)p % (uintptr_t)bytes == 0; }

// Calls f(T{}) with the storage type of `dtype`.
template <class F>
void with_dtype(DType dtype, const F& f) {
  if (dtype == DType::kFloat32) {
    f(float{});
  } else if (dtype == DType::kBFloat16) {
    f(__nv_bfloat16{});
  } else {
    f(__half{});
  }
}

// Blocks lie along x alone, the one dimension that goes beyond 65535.
inline dim3 grid_of(const char* stage, int64_t blocks) {
  if (blocks > INT32_MAX) {
    throw std::runtime_error(std::string("gpl_fast: ") + stage + ": got " + std::to_string(blocks) +
                             " blocks, expected less than 2^31");
  }
  return dim3((unsigned)blocks);
}

inline void check_launch(const char* stage) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return;
#ifdef CUDA_ON_CPU
  const std::string why = std::to_string((int)error);
#else
  const std::string why = cudaGetErrorString(error);
#endif
  throw std::runtime_error(std::string("gpl_fast: ") + stage + ": the launch failed: " + why);
}

}  // namespace gpl_fast::cuda
