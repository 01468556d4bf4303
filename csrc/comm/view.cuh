// One rank's view of a symmetric buffer: sizes, byte offsets of its regions, and local memory.
//
// Every field is a 64-bit integer and the list below is the only one: the binding hands the names
// to Python, which packs the values in this order, so the two sides cannot drift apart.
#pragma once

#include <cstdint>

#include "comm/offsets.cuh"

// clang-format off
#define MEGAMOE_COMM_VIEW(X)                                                                      \
  /* sizes */                                                                                     \
  X(world_size) X(rank) X(num_experts) X(experts_per_rank) X(max_tokens) X(top_k)                 \
  X(hidden_size) X(nvfp4)                                                                         \
  /* regions of symmetric memory: bytes from its start, the same on every rank */                 \
  X(x) X(x_sf) X(x_scales) X(topk_idx) X(topk_weights) X(num_tokens)                              \
  X(recv_x) X(recv_x_sf) X(recv_x_scales) X(recv_topk_idx) X(recv_topk_weights) X(recv_token)     \
  X(home_rows) X(epoch) X(dispatch_flags) X(combine_flags) X(progress) X(abort)                   \
  /* addresses: this rank's symmetric memory, and a device array [W] of every rank's */           \
  X(memory) X(peers)                                                                              \
  /* addresses of local device memory: the workspace of the layer ... */                          \
  X(rows) X(row_scales) X(expert_offsets)                                                         \
  /* ... and of these kernels: row_home int64 [W*T*K], the address of a row's place in the        \
     home_rows of its token's rank; slot_row int32 [W*T*K], the row of a received slot;           \
     owners uint32 [(W + 31) / 32, T rounded up to 4], the ranks of a token's experts, a bit each;\
     chunk_counts int32 [blocks, L]; send_counts int32 [W], what the last call sent; latches      \
     uint32 [kLatches], zero between launches but for those that stand for an error */            \
  X(row_home) X(slot_row) X(owners) X(chunk_counts) X(send_counts) X(latches)                     \
  /* pinned host memory that the device can write, int64 [16]: an abort record, a bad argument */ \
  X(status)                                                                                       \
  X(timeout_ns)                                                                                   \
  /* how the kernels are launched: the GPU's number, and blocks of 512 threads in each, more where \
     there are more tokens than blocks */                                                         \
  X(device) X(blocks) X(most_blocks)
// clang-format on

namespace megamoe::comm {

struct View {
#define MEGAMOE_FIELD(name) int64_t name;
  MEGAMOE_COMM_VIEW(MEGAMOE_FIELD)
#undef MEGAMOE_FIELD

  MEGAMOE_HD Experts experts() const {
    return {static_cast<int>(num_experts), static_cast<int>(experts_per_rank)};
  }
  MEGAMOE_HD int owner_words() const { return static_cast<int>(world_size + 31) / 32; }
  // Word `word` of all tokens' owners.
  MEGAMOE_HD uint32_t* owners_of(int word) const {
    return local<uint32_t>(owners) + word * ((max_tokens + 3) / 4 * 4);
  }
  MEGAMOE_HD int local_experts() const { return static_cast<int>(experts_per_rank); }
  // A staged row as it travels: packed E2M1, or bf16.
  MEGAMOE_HD int64_t x_bytes() const { return nvfp4 ? hidden_size / 2 : hidden_size * 2; }
  MEGAMOE_HD int64_t sf_bytes() const { return nvfp4 ? hidden_size / 16 : 0; }
  MEGAMOE_HD int64_t home_bytes() const { return hidden_size * 2; }

  // A region of this rank.
  template <typename T>
  MEGAMOE_HD T* mine(int64_t region) const {
    return reinterpret_cast<T*>(memory + region);
  }
  // The same region of the rank whose symmetric memory starts at `base`.
  template <typename T>
  MEGAMOE_HD static T* at(int64_t base, int64_t region) {
    return reinterpret_cast<T*>(base + region);
  }
  template <typename T>
  MEGAMOE_HD static T* local(int64_t address) {
    return reinterpret_cast<T*>(address);
  }
};

// Entries of View::latches.
enum Latch : int {
  kReadCall = 0,  // blocks of dispatch_expand that have read the call's number
  kGivenUp = 1,   // set once by the first waiter of this rank whose deadline passed
  kReported = 2,  // set once by the first to copy an abort record to the host
  kBadFound = 3,  // set by the first to find a bad argument; the host clears it, the last one
  kLatches = 4,
};

// Entries of View::status.
enum Status : int {
  kAbortFinder = 0,   // 1 + the rank whose deadline passed first, 0 while there is no abort
  kAbortPhase = 1,    // the record that follows is that of SymmBuffer.abort
  kAbortEpoch = 2,
  kAbortSeen = 3,
  kAbortMask = 4,     // four words: the ranks held responsible
  kBadInput = 8,      // a BadInput, 0 while there is none
  kBadToken = 9,      // where, in kBadExpert's case
  kBadSlot = 10,
  kBadValue = 11,     // what was given
  kStatusWords = 16,
};

enum BadInput : int {
  kBadExpert = 1,     // an expert id is below -1 or not below num_experts
  kBadNumTokens = 2,  // num_tokens, read on the device, is negative or above the rows of x
  kBadCombine = 3,    // rank kBadToken combines in another mode than this one
};

enum Phase : int { kDispatch = 0, kCombine = 1 };  // megamoe_ep/symm_buffer.py: PHASES

}  // namespace megamoe::comm
