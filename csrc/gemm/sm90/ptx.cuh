// Every instruction that C++ has no word for, one function each, but wgmma's own (mma.cuh). The tests
// that run kernels on the host have theirs of both files: tests/unit/host_cuda.
#pragma once

#include <cuda.h>
#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90_desc.hpp>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cstdint>

namespace megamoe::sm90 {

constexpr int kSharedBytes = 227 * 1024;  // that a block may have

// Threads.

// This thread's number in the block, read anew: what is worked out from it is not kept in registers
// while the accumulators need them.
__device__ __forceinline__ int thread_read_anew() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

__device__ __forceinline__ void sleep(uint32_t ns) { __nanosleep(ns); }

// The same number in every thread of a warp, known to be so to the compiler, which then keeps it and
// what follows from it where wgmma wants its descriptors.
__device__ __forceinline__ uint32_t uniform(uint32_t x) { return __reduce_or_sync(~0u, x); }

// True in one lane of a warp, and known to be so to the compiler.
__device__ __forceinline__ bool one_lane() { return cute::elect_one_sync(); }

// Of the one warpgroup that this thread is in.
__device__ __forceinline__ void sync_warpgroup() {
  asm volatile("bar.sync %0, 128;" ::"r"(1 + thread_read_anew() / 128) : "memory");
}

template <int registers>
__device__ __forceinline__ void give_registers_back() {
  cutlass::arch::warpgroup_reg_dealloc<registers>();
}

template <int registers>
__device__ __forceinline__ void take_registers() {
  cutlass::arch::warpgroup_reg_alloc<registers>();
}

// Barriers of shared memory, by address.

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void init_barrier(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Lets the copy engine and all threads see barriers as they were made.
__device__ __forceinline__ void show_barriers() { cutlass::arch::fence_barrier_init(); }

__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void arrive_and_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Until the barrier's phase of this parity is over; all who have to arrive are of this block.
__device__ __forceinline__ void wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred over;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
      "@!over bra again;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// The same for who has time: between looks it leaves the scheduler to others.
__device__ __forceinline__ void wait_patiently(uint32_t barrier, uint32_t parity) {
  uint32_t over;
  while (true) {
    asm volatile(
        "{\n"
        ".reg .pred over;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
        "selp.u32 %0, 1, 0, over;\n"
        "}"
        : "=r"(over)
        : "r"(barrier), "r"(parity)
        : "memory");
    if (over) return;
    __nanosleep(40);
  }
}

// What L2 keeps: weights pass once, or once for each token tile at about the same time.
constexpr uint64_t kEvictFirst = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_FIRST);
constexpr uint64_t kEvictLast = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_LAST);

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(map));
}

// Copies one after another into shared memory, completing on a stage's barrier.
__device__ __forceinline__ void copy_bulk(uint32_t to, const void* from, uint32_t bytes,
                                          uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}

__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap* map, int column, int row,
                                         uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(barrier), "l"(policy)
      : "memory");
}

// To device memory, this GPU's or another's.
__device__ __forceinline__ void store_8(int64_t address, uint2 v) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(address), "r"(v.x), "r"(v.y) : "memory");
}

// Past L1, which need not have what another kernel has written.
__device__ __forceinline__ int32_t load_from_l2(const int32_t* p) { return __ldcg(p); }

// A number of 4 or 8 bytes by this thread, into shared memory and not waited for.
template <typename T>
__device__ __forceinline__ void copy_word(T* to, const T* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared_address(to)), "l"(from),
               "n"(sizeof(T))
               : "memory");
}

// For all that this thread copies so.
__device__ __forceinline__ void wait_words() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ __forceinline__ uint2 load_shared_8(uint32_t address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
  return v;
}

__device__ __forceinline__ uint4 load_shared_16(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

// Arithmetic.

__device__ __forceinline__ float power_of_2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 0 where it is less than 2^-126: ptxas adds five instructions to reciprocal() for what is there.
__device__ __forceinline__ float reciprocal_of_1_and_more(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float min_or_nan(float x, float y) {
  float z;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}

__device__ __forceinline__ float max_or_nan(float x, float y) {
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}

}  // namespace megamoe::sm90
