// The ring of stages between the producer warps and the consumer warpgroups.
//
// A stage is two k64 blocks: those of each slab of the tile's weights, one slab after the other; then, for
// each part that a tile can have, the tokens of the first block and of the second, in rows of 128
// bytes. All experts' tiles are known before the first copy, so stages are only as wide as the widest
// needs, and few tokens get a deeper ring.
#pragma once

#include <cute/arch/copy_sm90_desc.hpp>

#include <cstdint>

#include "gemm/sm90/schedule.cuh"

namespace megamoe::sm90 {

constexpr int kBlockK = 64;
constexpr int kSlabBlockBytes = 4608;  // megamoe_ep/prepack/sm90.py: 4096 of codes, 512 of scales
constexpr int kScalesAt = 4096;
constexpr int kStageBlocks = 2;
constexpr int kStageK = kStageBlocks * kBlockK;
constexpr int kSlabStageBytes = kStageBlocks * kSlabBlockBytes;
constexpr int kTokenBytes = 2 * kBlockK;  // of a row of a block

MEGAMOE_HD constexpr int token_block_bytes(int width) { return loaded_rows(width) * kTokenBytes; }

template <typename Cut>
MEGAMOE_HD constexpr int stage_bytes(int width) {
  constexpr int kParts = Cut::kShares ? 2 : 1;
  return Cut::kSlabs * kSlabStageBytes + kParts * kStageBlocks * token_block_bytes(width);
}

// What L2 keeps: weights pass once, or once for each token tile at about the same time.
constexpr uint64_t kEvictFirst = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_FIRST);
constexpr uint64_t kEvictLast = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_LAST);

constexpr int kMaxStages = 8;

// Barriers of shared memory, by address.

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void init_barrier(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

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

struct Barriers {
  uint64_t full[kMaxStages];   // one arrival, and the bytes of a stage
  uint64_t empty[kMaxStages];  // one arrival of each consumer warp
};

// A place in the ring, and in time.
class Ring {
 public:
  __device__ Ring(uint32_t memory, int nbytes, uint32_t barriers, int stage_bytes)
      : memory_(memory), barriers_(barriers), stage_bytes_(stage_bytes),
        stages_(min(kMaxStages, nbytes / stage_bytes)) {}

  __device__ uint32_t stage() const { return memory_ + stage_ * stage_bytes_; }
  __device__ uint32_t full() const { return barriers_ + 8 * stage_; }
  __device__ uint32_t empty() const { return full() + 8 * kMaxStages; }
  __device__ void wait_full() const { wait(full(), phase_); }
  __device__ void wait_empty() const { wait_patiently(empty(), phase_ ^ 1); }
  __device__ void advance() {
    if (++stage_ == stages_) {
      stage_ = 0;
      phase_ ^= 1;
    }
  }

 private:
  uint32_t memory_;
  uint32_t barriers_;
  int stage_bytes_;
  int stages_;
  int stage_ = 0;
  uint32_t phase_ = 0;
};

// Copies one after another into shared memory, completing on a stage's barrier.
__device__ __forceinline__ void copy_bulk(uint32_t to, const void* from, uint32_t bytes,
                                          uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}

__device__ __forceinline__ void copy_box(uint32_t to, const void* map, int column, int row,
                                         uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(barrier), "l"(policy)
      : "memory");
}

// One float by this thread, into shared memory and not waited for.
__device__ __forceinline__ void copy_float(float* to, const float* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from)
               : "memory");
}

// For all that this thread copies so.
__device__ __forceinline__ void wait_floats() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ __forceinline__ uint4 load_shared_16(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

}  // namespace megamoe::sm90
