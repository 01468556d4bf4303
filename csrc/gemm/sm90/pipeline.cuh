// The ring of stages between the producer warps and the consumer warpgroups.
//
// A stage is two k64 blocks: of each slab of the tile, one after the other, the weights; then, for each
// part that a tile can have, the tokens of the first block and of the second, in rows of 128
// bytes. All experts' tiles are known before the first copy, so stages are only as long as the longest
// needs, and few tokens get a deeper ring.
#pragma once

#include <cstdint>

#include "gemm/sm90/ptx.cuh"
#include "gemm/sm90/schedule.cuh"

namespace megamoe::sm90 {

constexpr int kBlockK = 64;
constexpr int kStageBlocks = 2;
constexpr int kStageK = kStageBlocks * kBlockK;
constexpr int kSlabStageBytes = 9216;  // megamoe_ep/prepack/sm90.py: codes of each block, then scales
constexpr int kBlockCodeBytes = 4096;
constexpr int kScalesAt = kStageBlocks * kBlockCodeBytes;
constexpr int kTokenBytes = 2 * kBlockK;  // of a row of a block

MEGAMOE_HD constexpr int token_block_bytes(int rows) { return rows * kTokenBytes; }

template <typename Cut>
MEGAMOE_HD constexpr int stage_bytes(int token_rows) {
  return Cut::kSlabs * kSlabStageBytes + kStageBlocks * token_block_bytes(token_rows);
}

// Tokens as TMA leaves them with 128-byte swizzle, rows of 64 bf16, eight of them to a pattern: the low
// half of their descriptor, which counts 16 bytes, and the high half, which is the same for all.
__device__ __forceinline__ uint32_t low_descriptor(uint32_t shared_address) {
  constexpr uint32_t kUnused = 1 << 16;
  return kUnused | shared_address >> 4;
}
constexpr uint64_t kSwizzle128 = 1ull << 62;
constexpr uint64_t kPatternStride = static_cast<uint64_t>(1024 >> 4) << 32;

constexpr int kMaxStages = 8;
// A tile may have one stage, of 128 of k: so many tiles in the ring, and one that is being stored.
constexpr int kMaxTiles = kMaxStages + 1;

struct Barriers {
  uint64_t full[kMaxStages];   // one arrival, and the bytes of a stage
  uint64_t empty[kMaxStages];  // one arrival of each consumer thread
};

// A place in the ring, and in time.
class Ring {
 public:
  __device__ Ring(uint32_t memory, int nbytes, uint32_t barriers, int stage_bytes)
      : memory_(memory), barriers_(barriers), stage_bytes_(stage_bytes),
        stages_(min(kMaxStages, divide(nbytes, stage_bytes))) {}

  __device__ uint32_t memory() const { return memory_; }
  __device__ uint32_t offset() const { return stage_ * stage_bytes_; }
  __device__ uint32_t stage() const { return memory_ + offset(); }
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

}  // namespace megamoe::sm90
