// mbarrier, TMA and wgmma of sm_90a. The CPU's side of it, for the tests, is
// tests/cuda_on_cpu/hopper_on_cpu.h.
//
// Opt-in: runs where conv_block_bwd_sm90.cu says.
#pragma once

#include "ptx.cuh"

namespace gpl_fast::cuda {

// Of a map in memory: [n, h, w, c] of 16-bit elements, each image contiguous.
struct MapShape {
  int64_t n, h, w, c, image_stride;
};

}  // namespace gpl_fast::cuda

#ifdef CUDA_ON_CPU
#include "hopper_on_cpu.h"
#else

#include <cuda.h>
#include <cuda_runtime.h>

#include <stdexcept>

#define GRID_CONSTANT const __grid_constant__

namespace gpl_fast::cuda {

using TensorMap = CUtensorMap;

// Barriers lie in static shared memory: a kernel without any was compiled for another architecture.
template <class Kernel>
bool compiled_for_sm90a(Kernel kernel) {
  cudaFuncAttributes attributes;
  const bool there = cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess;
  cudaGetLastError();
  return there && attributes.sharedSizeBytes > 0;
}

// By dimensions from the innermost on, in boxes with the 128-byte swizzle.
inline TensorMap tensor_map(const void* p, bool bfloat16, int dims, const cuuint64_t* sizes,
                            const cuuint64_t* pitch, const cuuint32_t* box) {
  static const auto encode = [] {
    void* f = nullptr;  // through the runtime: the library loads without a driver
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault,
                                     &found);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &f, cudaEnableDefault, &found);
#endif
    return (decltype(&cuTensorMapEncodeTiled))f;
  }();
  if (!encode) throw std::runtime_error("gpl_fast: the driver has no cuTensorMapEncodeTiled");
  TensorMap map;
  const cuuint32_t step[] = {1, 1, 1, 1};
  const CUresult result = encode(
      &map, bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, dims,
      (void*)p, sizes, pitch, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("gpl_fast: cuTensorMapEncodeTiled failed: " +
                             std::to_string((int)result));
  }
  return map;
}
// A matrix [rows, columns] of 16-bit elements.
inline TensorMap tensor_map(const void* p, bool bfloat16, int64_t rows, int64_t columns,
                            int box_rows, int box_columns) {
  const cuuint64_t sizes[] = {(cuuint64_t)columns, (cuuint64_t)rows};
  const cuuint64_t pitch[] = {(cuuint64_t)columns * 2};
  const cuuint32_t box[] = {(cuuint32_t)box_columns, (cuuint32_t)box_rows};
  return tensor_map(p, bfloat16, 2, sizes, pitch, box);
}
inline TensorMap tensor_map(const void* p, bool bfloat16, const MapShape& s, int box_h, int box_w,
                            int box_c) {
  const cuuint64_t sizes[] = {(cuuint64_t)s.c, (cuuint64_t)s.w, (cuuint64_t)s.h, (cuuint64_t)s.n};
  const cuuint64_t pitch[] = {(cuuint64_t)s.c * 2, (cuuint64_t)(s.w * s.c) * 2,
                              (cuuint64_t)s.image_stride * 2};
  const cuuint32_t box[] = {(cuuint32_t)box_c, (cuuint32_t)box_w, (cuuint32_t)box_h, 1};
  return tensor_map(p, bfloat16, 4, sizes, pitch, box);
}

namespace ptx {

__device__ __forceinline__ void mbarrier_init(uint64_t* b, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(count)
               : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint64_t* b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}
__device__ __forceinline__ void mbarrier_expect(uint64_t* b, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)),
               "r"(bytes)
               : "memory");
}
// Until the phase of this parity is complete.
__device__ __forceinline__ void mbarrier_wait(uint64_t* b, int parity) {
  asm volatile(
      "{\n.reg .pred p;\nAGAIN_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra AGAIN_%=;\n}\n" ::"r"(
          shared_address(b)),
      "r"(parity)
      : "memory");
}
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void tma_load(void* dst, const TensorMap* map, uint64_t* barrier,
                                         int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(dst)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row)
      : "memory");
}
__device__ __forceinline__ void tma_load(void* dst, const TensorMap* map, uint64_t* barrier, int c,
                                         int w, int h, int n) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(dst)),
      "l"(map), "r"(shared_address(barrier)), "r"(c), "r"(w), "r"(h), "r"(n)
      : "memory");
}
// For some of the block's warps.
__device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// An operand of wgmma whose rows or columns are contiguous, in slabs of 64: lead = bytes from slab
// to slab, stride = from 8 rows to 8.
__device__ __forceinline__ uint64_t wgmma_descriptor(const void* p, uint32_t lead,
                                                     uint32_t stride) {
  return (uint64_t)((shared_address(p) & 0x3ffff) >> 4) | (uint64_t)(lead >> 4) << 16 |
         (uint64_t)(stride >> 4) << 32 | 1ull << 62;
}
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kKeep>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kKeep) : "memory");
}
// The products in flight read and write these behind the compiler's back.
template <int N>
__device__ __forceinline__ void keep_in_place(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int N>
__device__ __forceinline__ void registers_give() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ __forceinline__ void registers_take() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// d += a b: m64nNk16, a in registers, b in shared memory with its columns contiguous.
template <bool kBFloat16, int N>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b);

#define GPL_D8(i)                                                                             \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define GPL_D16(i) GPL_D8(i), GPL_D8(i + 8)
#define GPL_D32(i) GPL_D16(i), GPL_D16(i + 16)
#define GPL_D64(i) GPL_D32(i), GPL_D32(i + 32)
#define GPL_WGMMA(N, kBFloat16, TYPE, DS, A0, A1, A2, A3, B, ...)                                  \
  template <>                                                                                      \
  __device__ __forceinline__ void wgmma<kBFloat16, N>(float (&d)[N / 2], const uint32_t (&a)[4],   \
                                                      uint64_t b) {                                \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" DS "}, {" A0 \
                 ", " A1 ", " A2 ", " A3 "}, " B ", 1, 1, 1, 1;\n"                                 \
                 : __VA_ARGS__                                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                            \
  }
#define GPL_D32_NAMES "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
GPL_WGMMA(32, true, "bf16", GPL_D32_NAMES, "%16", "%17", "%18", "%19", "%20", GPL_D16(0))
GPL_WGMMA(32, false, "f16", GPL_D32_NAMES, "%16", "%17", "%18", "%19", "%20", GPL_D16(0))
#undef GPL_D32_NAMES
#define GPL_D64_NAMES                                                      \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
GPL_WGMMA(64, true, "bf16", GPL_D64_NAMES, "%32", "%33", "%34", "%35", "%36", GPL_D32(0))
GPL_WGMMA(64, false, "f16", GPL_D64_NAMES, "%32", "%33", "%34", "%35", "%36", GPL_D32(0))
#undef GPL_D64_NAMES
#define GPL_D128_NAMES                                                               \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
GPL_WGMMA(128, true, "bf16", GPL_D128_NAMES, "%64", "%65", "%66", "%67", "%68", GPL_D64(0))
GPL_WGMMA(128, false, "f16", GPL_D128_NAMES, "%64", "%65", "%66", "%67", "%68", GPL_D64(0))

// d += a b: m64n128k16, a in shared memory with its rows contiguous, b with its columns along k.
template <bool kBFloat16, int N>
__device__ __forceinline__ void wgmma_shared(float (&d)[N / 2], uint64_t a, uint64_t b);
#define GPL_WGMMA_SHARED(kBFloat16, TYPE)                                                         \
  template <>                                                                                     \
  __device__ __forceinline__ void wgmma_shared<kBFloat16, 128>(float (&d)[64], uint64_t a,        \
                                                               uint64_t b) {                      \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {" GPL_D128_NAMES \
                 "}, %64, %65, 1, 1, 1, 1, 0;\n"                                                  \
                 : GPL_D64(0)                                                                     \
                 : "l"(a), "l"(b));                                                               \
  }
GPL_WGMMA_SHARED(true, "bf16")
GPL_WGMMA_SHARED(false, "f16")
#undef GPL_WGMMA_SHARED
#undef GPL_D128_NAMES
#define GPL_D160_NAMES                                                               \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
GPL_WGMMA(160, true, "bf16", GPL_D160_NAMES, "%80", "%81", "%82", "%83", "%84", GPL_D64(0),
          GPL_D16(64))
GPL_WGMMA(160, false, "f16", GPL_D160_NAMES, "%80", "%81", "%82", "%83", "%84", GPL_D64(0),
          GPL_D16(64))
#undef GPL_D160_NAMES
#define GPL_D256_NAMES                                                                           \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                       \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "             \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "             \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "             \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
GPL_WGMMA(256, true, "bf16", GPL_D256_NAMES, "%128", "%129", "%130", "%131", "%132", GPL_D64(0),
          GPL_D64(64))
GPL_WGMMA(256, false, "f16", GPL_D256_NAMES, "%128", "%129", "%130", "%131", "%132", GPL_D64(0),
          GPL_D64(64))
#undef GPL_D256_NAMES
#undef GPL_WGMMA
#undef GPL_D64
#undef GPL_D32
#undef GPL_D16
#undef GPL_D8

}  // namespace ptx
}  // namespace gpl_fast::cuda

#endif
