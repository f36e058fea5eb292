// Every PTX instruction that kernels use, one function each, and beside it a host twin that does what the PTX ISA documents.
// Kernels read as algorithms and run on both sides.
#pragma once
#include <type_traits>

#include "common/device.cuh"
#include "common/formats.h"

#ifndef __CUDACC__
#include "common/ptx_host.h"
#endif

namespace hybrid::cuda {

// ---- conversions: to nearest, ties to even; every NaN becomes 0x7fff ---------------------------------------------------------

__device__ __forceinline__ f16 cvt_rn_f16(float x) {
#ifdef __CUDACC__
  f16 out;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
  return out;
#else
  return {ptx_host::round_to_16<5, 10>(x)};
#endif
}

__device__ __forceinline__ bf16 cvt_rn_bf16(float x) {
#ifdef __CUDACC__
  bf16 out;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
  return out;
#else
  return {ptx_host::round_to_16<8, 7>(x)};
#endif
}

__device__ __forceinline__ float cvt_f32(f16 x) {
#ifdef __CUDACC__
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(x.bits));
  return out;
#else
  return ptx_host::widen_f16(x.bits);
#endif
}

// ---- memory ------------------------------------------------------------------------------------------------------------------

// Stores 16 bytes to global memory, at a multiple of 16. Left to itself the compiler splits such a store where another branch
// stores parts of it.
__device__ __forceinline__ void st_global_16(void* p, const uint4& value) {
#ifdef __CUDACC__
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(value.x), "r"(value.y),
               "r"(value.z), "r"(value.w)
               : "memory");
#else
  simt::require_alignment(p, 16, simt::Site::current());
  *static_cast<uint4*>(p) = value;
#endif
}

// ---- asynchronous copies to shared memory ------------------------------------------------------------------------------------

// Starts copying 16 bytes, of which the last 16 - valid_bytes are written as zeros and not read. Both addresses are multiples of
// 16. Nothing has arrived before cp_async_wait() returns in this thread, nor for other threads before the barrier after it.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, int valid_bytes = 16) {
#ifdef __CUDACC__
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(valid_bytes) : "memory");
#else
  simt::require_alignment(shared, 16, simt::Site::current());
  simt::require_alignment(global, 16, simt::Site::current());
  simt::copy_later(shared, global, valid_bytes, 16 - valid_bytes);
#endif
}

// Ends a group: the copies started since the last commit.
__device__ __forceinline__ void cp_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  simt::commit_copies();
#endif
}

// Waits until at most kGroupsLeft of this thread's groups, the latest ones, are under way.
template <int kGroupsLeft>
__device__ __forceinline__ void cp_async_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
#else
  simt::wait_for_copies(kGroupsLeft);
#endif
}

// ---- matrices of 8x8 16-bit elements -----------------------------------------------------------------------------------------

// Loads four of them. Lane l gives the address of row l % 8 of matrix l / 8 (16 bytes, aligned to 16). out[m] holds, of matrix m,
// row l / 4, columns 2 (l % 4) (low half) and 2 (l % 4) + 1.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&out)[4], const void* row) {
#ifdef __CUDACC__
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
#else
  ptx_host::load_matrices<4, false>(out, row);
#endif
}

// The same, each matrix transposed: out[m] holds rows 2 (l % 4) and 2 (l % 4) + 1 of column l / 4.
__device__ __forceinline__ void ldmatrix_x4_transposed(uint32_t (&out)[4], const void* row) {
#ifdef __CUDACC__
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
#else
  ptx_host::load_matrices<4, true>(out, row);
#endif
}

// d[16x8] += a[16x16] b[16x8], in float. With g = lane / 4 and t = lane % 4 a lane holds, each register two elements, low half
// first:
//   a[0]: row g, columns 2t, 2t+1   a[1]: row g+8   a[2]: row g, columns 2t+8, 2t+9   a[3]: row g+8, those columns
//   b[0]: column g, rows 2t, 2t+1   b[1]: column g, rows 2t+8, 2t+9
//   d[0], d[1]: row g, columns 2t, 2t+1   d[2], d[3]: row g+8
// T is f16 or bf16. The order of the 16 additions is not documented: the twin adds exactly and rounds once.
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#else
  ptx_host::multiply_matrices<T>(d, a, b);
#endif
}

}  // namespace hybrid::cuda
