// Where each row of a call lies: arithmetic of dispatch and combine, the same on host and device.
//
// Nothing here reads or writes symmetric memory; everything here is tested on the host against
// megamoe_ep/kernels/portable.py.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace megamoe::comm {

constexpr int kLanes = 32;      // tokens or entries that a warp places at once
constexpr int kMaxTopK = 32;    // megamoe_ep/shape.py: MAX_TOP_K, one lane a slot
constexpr int kBatch = 128;     // tokens whose positions a block keeps in shared memory at a time

MEGAMOE_HD int population(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __popc(bits);
#else
  return __builtin_popcount(bits);
#endif
}

// Bits of the lanes below `lane`.
MEGAMOE_HD uint32_t lanes_below(int lane) { return (1u << lane) - 1u; }

struct Chunk {
  int begin;
  int end;
};

// Part `i` of 0..n cut into `parts` contiguous parts that differ by at most one, the longer ones first.
MEGAMOE_HD Chunk chunk_of(int n, int parts, int i) {
  const int each = static_cast<int>(static_cast<uint32_t>(n) / static_cast<uint32_t>(parts));
  const int longer = n - each * parts;
  const int begin = each * i + (i < longer ? i : longer);
  return {begin, begin + each + (i < longer)};
}

// How many of `blocks` blocks share the same tokens where few are received: a power of 2, at most 8, so
// that these tokens are about 8. There are blocks for all.
MEGAMOE_HD int sharing_log2_of(int64_t received, int64_t blocks) {
  int log2 = 0;
  while (log2 < 3 && received << log2 < 8 * blocks && 2 << log2 <= blocks) ++log2;
  return log2;
}

// Rank r owns experts r * per_rank .. (r + 1) * per_rank - 1; every other id means "no expert".
class Experts {
 public:
  // At most 65536 of them (megamoe_ep/shape.py: MAX_EXPERTS): then `quotient_` divides exactly.
  MEGAMOE_HD Experts(int num_experts, int per_rank)
      : num_experts(num_experts), per_rank(per_rank),
        quotient_(uint64_t{0xffffffffu / static_cast<uint32_t>(per_rank)} + 1) {}

  MEGAMOE_HD int owner(int expert) const {
    return static_cast<uint32_t>(expert) < static_cast<uint32_t>(num_experts)
               ? static_cast<int>(static_cast<uint32_t>(expert) * quotient_ >> 32)
               : -1;
  }
  // Number of the expert on `rank`, or -1 where another rank owns it or there is no expert.
  MEGAMOE_HD int local(int expert, int rank) const {
    const int e = expert - rank * per_rank;
    return static_cast<uint32_t>(expert) < static_cast<uint32_t>(num_experts) &&
                   static_cast<uint32_t>(e) < static_cast<uint32_t>(per_rank)
               ? e
               : -1;
  }

  const int num_experts;
  const int per_rank;

 private:
  uint64_t quotient_;  // 2^32 / per_rank, rounded up: a division, without dividing
};

// The rank whose block holds received token `i` of the blocks laid end to end; prefix[s] is the
// number of tokens in the blocks before s, prefix[ranks] all of them, and i < prefix[ranks]. Or entry
// `i`, of `each` a token.
MEGAMOE_HD int source_of(const int* prefix, int ranks, int i, int each = 1) {
  int low = 0;
  int high = ranks - 1;
#pragma unroll 1
  while (low < high) {
    const int mid = (low + high + 1) / 2;
    if (prefix[mid] * each <= i) {
      low = mid;
    } else {
      high = mid - 1;
    }
  }
  return low;
}

// slot_row: a slot of the `index`-th token that came from a rank.
MEGAMOE_HD int64_t slot_index(int64_t source, int64_t index, int slot, int64_t max_tokens,
                              int top_k) {
  return (source * max_tokens + index) * top_k + slot;
}

// Row of the owner's home_rows. exact: one row a slot. fast: one row a rank that owns experts of
// the token, in ascending order of the ranks.
MEGAMOE_HD int64_t home_row(int64_t token, int top_k, int slot_or_ordinal) {
  return token * top_k + slot_or_ordinal;
}

// A flag: the call that it belongs to and a count, below kStep / 2.
MEGAMOE_HD uint64_t make_flag(uint64_t call, uint32_t count) { return call << 32 | count; }
MEGAMOE_HD uint32_t flag_call(uint64_t flag) { return static_cast<uint32_t>(flag >> 32); }
MEGAMOE_HD uint32_t flag_count(uint64_t flag) { return static_cast<uint32_t>(flag); }

// A grid of `blocks` raises a flag from one value to the next by additions, one a block, in any
// order: kStep each, and the last block in number what is then missing. Until all have added, the
// flag does not have the new call's number: short of that block it is `from` plus at most 1022 steps,
// which do not carry into the call, and with it `to` less at least one step, which borrows from it.
constexpr uint64_t kStep = uint64_t{1} << 22;
constexpr int kMostBlocks = 1023;

MEGAMOE_HD uint64_t last_step(uint64_t from, uint64_t to, int blocks) {
  return to - from - static_cast<uint64_t>(blocks - 1) * kStep;
}
// What a flag was before the blocks that have added kStep to it so far.
MEGAMOE_HD uint64_t before_steps(uint64_t flag) { return flag & ~(uint64_t{kMostBlocks} * kStep); }

}  // namespace megamoe::comm
