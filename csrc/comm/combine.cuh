// Combine: the experts' rows go back to their tokens' ranks, which add them up.
//
//   combine_send_rows  "exact": every row goes home as it is, unless L2 has stored it there itself
//   combine_send_sums  "fast": a rank adds its own rows of a token, weighted, and sends one
//   combine_sum        waits for all ranks' flags, adds up what came home
//
// Sums are in fp32 and start from +0; multiplication and addition are rounded apart, so that every
// kernel set gives the same bits. exact adds weight x row in slot order; fast adds a rank's own rows
// in slot order, then the ranks' sums in rank order.
// Floors: wire bytes over the link's store bandwidth for the first two, memory bandwidth for the last.
#pragma once

#include <cuda_bf16.h>

#include "comm/call.cuh"
#include "comm/copy.cuh"

namespace megamoe::comm {

MEGAMOE_HD int64_t combine_shared_bytes(const View& v) { return 4 * (v.world_size + 1); }

// Rows are added up in parts: so many pieces of 8 elements a lane.
constexpr int kSumPieces = 2;
MEGAMOE_HD int parts_of_sum(int row_bytes) {
  constexpr int kPartBytes = 32 * kSumPieces * 16;
  return (row_bytes + kPartBytes - 1) / kPartBytes;
}

// Blocks of which each warp has a part of these rows.
MEGAMOE_HD int64_t blocks_for(int64_t rows, int parts) {
  return (rows * parts + kWarps - 1) / kWarps;
}

// One lane's share of a row: kPieces pieces of 8 elements, 256 elements apart.
template <int kPieces>
struct Sum {
  float value[kPieces][8] = {};

  static __device__ __forceinline__ void load(const char* row, int first, int pieces,
                                              uint4 (&piece)[kPieces]) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      if (first + 32 * i < pieces) piece[i] = load_16(row + (first + 32 * i) * 16);
    }
  }

  template <bool kWeighted>
  __device__ __forceinline__ void add(const uint4 (&piece)[kPieces], float weight) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const uint32_t words[4] = {piece[i].x, piece[i].y, piece[i].z, piece[i].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float low = __uint_as_float(words[j] << 16);
        const float high = __uint_as_float(words[j] & 0xffff0000u);
        value[i][2 * j] =
            __fadd_rn(value[i][2 * j], kWeighted ? __fmul_rn(weight, low) : low);
        value[i][2 * j + 1] =
            __fadd_rn(value[i][2 * j + 1], kWeighted ? __fmul_rn(weight, high) : high);
      }
    }
  }

  __device__ __forceinline__ void store(char* row, int first, int pieces) const {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(value[i][2 * j], value[i][2 * j + 1]);
        memcpy(&words[j], &pair, 4);
      }
      if (first + 32 * i < pieces) {
        store_16(row + (first + 32 * i) * 16, {words[0], words[1], words[2], words[3]});
      }
    }
  }
};

// Adds the rows of `slots`, lowest first, to this lane's share; lane k holds the number of slot k's
// row among those at `rows`, and its weight. kRows of them are in flight at a time. One warp.
template <bool kWeighted, int kPieces, int kRows>
__device__ __forceinline__ Sum<kPieces> add_rows(uint32_t slots, const char* rows, int row,
                                                 float weight, int first, int pieces) {
  Sum<kPieces> sum;
  for (uint32_t left = slots; left;) {
    uint4 piece[kRows][kPieces] = {};
    float weights[kRows];
    const uint32_t these = left;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (!left) break;
      const int slot = __ffs(left) - 1;
      left &= left - 1;
      const int64_t from = __shfl_sync(~0u, row, slot);
      weights[i] = kWeighted ? __shfl_sync(~0u, weight, slot) : 0.f;
      Sum<kPieces>::load(rows + from * pieces * 16, first, pieces, piece[i]);
    }
    const int count = population(these) - population(left);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (i < count) sum.template add<kWeighted>(piece[i], weights[i]);
    }
  }
  return sum;
}

// This warp's shares of so many rows. Few rows: as many warps share a row as there are for it. Many:
// a warp takes whole rows, which are neighbours; so at any time the warps' rows are those of all
// ranks, and every link is in use.
struct Shares {
  int of_row;  // shares of one row
  int begin, end;

  __device__ __forceinline__ Shares(int rows, int parts) {
    const int warps = static_cast<int>(warps_of_grid());
    of_row = max(min(warps / max(rows, 1), parts), 1);
    const int shares = rows * of_row;
    const int each = (shares + warps - 1) / warps;
    begin = min(static_cast<int>(warp_of_grid()) * each, shares);
    end = min(begin + each, shares);
  }
};

// Lanes of a warp, each with the owner of its slot's expert or -1: one lane of every distinct owner.
__device__ __forceinline__ uint32_t distinct_owners(int owner, int lane) {
  const uint32_t same = __match_any_sync(~0u, owner);
  return __ballot_sync(~0u, owner >= 0 && (same & lanes_below(lane)) == 0);
}

// What a combine flag carries beside the call: a rank in the other mode is told apart by it.
enum Mode : int { kExactMode = 0, kFastMode = 1 };  // megamoe_ep/kernels/portable.py: _MODES

// What one of so many blocks adds to its rank's combine flags, the same at every rank. Not to be asked for
// after it has added it. The call is that of the dispatch flags: its last kernel may still be at work.
__device__ __forceinline__ uint64_t combine_step(const View& v, Mode mode, int block, int blocks) {
  if (block + 1 != blocks) return kStep;
  const uint64_t own = load_relaxed_sys(v.mine<uint64_t>(v.combine_flags) + v.rank);
  const uint64_t dispatched = load_relaxed_sys(v.mine<uint64_t>(v.dispatch_flags) + v.rank);
  return last_step(before_steps(own), make_flag(flag_call(dispatched), mode), blocks);
}

// Once the block has stored its rows.
__device__ __forceinline__ void raise_combine_flags(const View& v, uint64_t step) {
  __syncthreads();
  const int r = threadIdx.x;
  if (r < v.world_size) add_to_flag(v, v.combine_flags, r, step);
}

__global__ void __launch_bounds__(kThreads, 2)
    combine_send_rows(const __grid_constant__ View v) {
  const uint64_t step = combine_step(v, kExactMode, blockIdx.x, gridDim.x);
  const bool failed = call_failed(v);
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (failed) return;

  const int rows = View::local<const int32_t>(v.expert_offsets)[v.local_experts()];
  const int lane = threadIdx.x % 32;
  const int row_bytes = static_cast<int>(v.home_bytes());
  const Rows kind(row_bytes);
  const Shares shares(rows, kind.parts);

  for (int first = shares.begin; first < shares.end; first += 32) {
    // Where the next 32 shares of this warp go, one a lane: their look-ups overlap.
    const int mine = first + lane;
    const int64_t to =
        mine < shares.end ? View::local<const int64_t>(v.row_home)[mine / shares.of_row] : 0;
    for (int i = 0; i < min(32, shares.end - first); ++i) {
      const int64_t row = (first + i) / shares.of_row;
      const char* from = View::local<const char>(v.rows) + row * row_bytes;
      char* there = View::local<char>(__shfl_sync(~0u, to, i));
      for (int nth = (first + i) % shares.of_row; nth < kind.parts; nth += shares.of_row) {
        Part part;
        part.load(from, kind, nth);
        part.store(there, kind, nth);
      }
    }
  }
  raise_combine_flags(v, step);
}

__global__ void __launch_bounds__(kThreads, 2)
    combine_send_sums(const __grid_constant__ View v) {
  constexpr int kRows = 3;
  extern __shared__ int shared[];
  int* prefix = shared;
  const uint64_t step = combine_step(v, kFastMode, blockIdx.x, gridDim.x);
  read_counts(v, v.dispatch_flags, prefix);
  const bool failed = call_failed(v);

  const int lane = threadIdx.x % 32;
  const int ranks = static_cast<int>(v.world_size);
  const int top_k = static_cast<int>(v.top_k);
  const int row_bytes = static_cast<int>(v.home_bytes());
  const int pieces = row_bytes / 16;
  const int parts = parts_of_sum(row_bytes);
  sum_up(prefix, ranks);  // its barrier also where nothing is to be done
  const Shares shares(failed ? 0 : prefix[ranks], parts);
  const int64_t* peers = View::local<const int64_t>(v.peers);
  const char* rows = View::local<const char>(v.rows);

  // A share's token: where its sum goes, the weight of this lane's slot, and where its row is told.
  struct Token {
    char* to;
    float weight;
    int slot;
  };
  // From what has come in, which the dispatch flags vouch for.
  const auto look_up = [&](int share) -> Token {
    if (share >= shares.end) return {nullptr, 0.f, 0};
    const Received r = received_token(prefix, ranks, share / shares.of_row);
    const int64_t block = r.source * v.max_tokens + r.index;
    const int64_t slot = block * top_k + min(lane, top_k - 1);
    int owner = -1;
    float weight = 0.f;
    if (lane < top_k) {
      owner = v.experts().owner(
          static_cast<int>(load_relaxed_gpu(v.mine<const int32_t>(v.recv_topk_idx) + slot)));
      weight = __uint_as_float(load_relaxed_gpu(v.mine<const float>(v.recv_topk_weights) + slot));
    }
    const int64_t token =
        static_cast<int>(load_relaxed_gpu(v.mine<const int32_t>(v.recv_token) + block));
    const int ordinal = population(distinct_owners(owner < v.rank ? owner : -1, lane));
    return {View::at<char>(peers[r.source], v.home_rows) +
                home_row(token, top_k, ordinal) * row_bytes,
            weight, static_cast<int>(slot)};
  };
  // From what dispatch_expand left: not before the wait, should nothing lie between.
  const auto row_of = [&](const Token& token) {
    return lane < top_k ? View::local<const int32_t>(v.slot_row)[token.slot] : -1;
  };

  Token next = look_up(shares.begin);
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (failed) return;
  int next_row = row_of(next);

  for (int share = shares.begin; share < shares.end; ++share) {
    const Token token = next;
    const int row = next_row;
    next = look_up(share + 1);
    next_row = row_of(next);
    const uint32_t slots = __ballot_sync(~0u, row >= 0);
    for (int part = share % shares.of_row; part < parts; part += shares.of_row) {
      const int first = part * 32 * kSumPieces + lane;
      add_rows<true, kSumPieces, kRows>(slots, rows, row, token.weight, first, pieces)
          .store(token.to, first, pieces);
    }
  }
  raise_combine_flags(v, step);
}

// NaN where this block would put sums: other blocks may see the call succeed.
__device__ __forceinline__ void fill_with_nan(char* y, const Shares& shares, int row_bytes) {
  constexpr uint32_t kNans = 0x7fc07fc0;
  const int lane = threadIdx.x % 32;
  const int pieces = row_bytes / 16;
  const int parts = parts_of_sum(row_bytes);
  for (int share = shares.begin; share < shares.end; ++share) {
    char* row = y + static_cast<int64_t>(share / shares.of_row) * row_bytes;
    for (int part = share % shares.of_row; part < parts; part += shares.of_row) {
#pragma unroll 1
      for (int i = 0; i < kSumPieces; ++i) {
        const int piece = (part * kSumPieces + i) * 32 + lane;
        if (piece < pieces) store_16(row + piece * 16, {kNans, kNans, kNans, kNans});
      }
    }
  }
}

// `raises`: the kernel ahead has stored the rows at their homes, and nobody has told of them yet.
template <bool kExact>
__global__ void __launch_bounds__(kThreads, 2)
    combine_sum(const __grid_constant__ View v, char* y, int y_rows, int raises) {
  constexpr int kRows = 3;
  extern __shared__ int shared[];
  int* mode = shared;
  const int lane = threadIdx.x % 32;
  const int top_k = static_cast<int>(v.top_k);
  const int row_bytes = static_cast<int>(v.home_bytes());
  const int pieces = row_bytes / 16;
  const int parts = parts_of_sum(row_bytes);
  const Shares shares(min(num_staged(v), y_rows), parts);
  const char* home_rows = v.mine<const char>(v.home_rows);

  // A share's token: which of its top_k places in home_rows hold something, and this lane's weight.
  struct Token {
    uint32_t rows;
    float weight;
  };
  const auto look_up = [&](int share) -> Token {
    if (share >= shares.end) return {0, 0.f};
    const int64_t slot = static_cast<int64_t>(share / shares.of_row) * top_k + lane;
    int owner = -1;
    float weight = 0.f;
    if (lane < top_k) {
      owner = v.experts().owner(
          static_cast<int>(load_relaxed_gpu(v.mine<const int32_t>(v.topk_idx) + slot)));
      if (kExact) {
        weight = __uint_as_float(load_relaxed_gpu(v.mine<const float>(v.topk_weights) + slot));
      }
    }
    if constexpr (kExact) return {__ballot_sync(~0u, owner >= 0), weight};
    const int owners = population(distinct_owners(owner, lane));
    return {owners == 32 ? ~0u : lanes_below(owners), weight};
  };

  Token next = look_up(shares.begin);
  if (raises && blockIdx.x == 0) {
    const uint64_t step = combine_step(v, kExact ? kExactMode : kFastMode, 0, 1);
    const bool failed = call_failed(v);
    wait_for_previous_kernel();
    if (!failed) raise_combine_flags(v, step);
  }
  bool ok = wait_for_flags(v, v.combine_flags, kCombine, last_call(v), mode);
  let_next_kernel_start();
  if (ok) {
    constexpr int kMode = kExact ? kExactMode : kFastMode;
    if (threadIdx.x < v.world_size && mode[threadIdx.x] != kMode) {
      ok = false;
      report_bad_input(v, kBadCombine, threadIdx.x, 0, mode[threadIdx.x]);
    }
    ok = __syncthreads_and(ok);
  }
  if (!ok) fill_with_nan(y, shares, row_bytes);  // no part of y may pass for a result
  for (int share = ok ? shares.begin : shares.end; share < shares.end; ++share) {
    const Token token = next;
    next = look_up(share + 1);
    const int64_t t = share / shares.of_row;
    const int row = static_cast<int>(home_row(t, top_k, lane));
    for (int part = share % shares.of_row; part < parts; part += shares.of_row) {
      const int first = part * 32 * kSumPieces + lane;
      add_rows<kExact, kSumPieces, kRows>(token.rows, home_rows, row, token.weight, first, pieces)
          .store(y + t * row_bytes, first, pieces);
    }
  }
  wait_for_previous_kernel();
}

}  // namespace megamoe::comm
