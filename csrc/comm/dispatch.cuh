// Dispatch: every staged token goes once to each rank that owns one of its experts, and what has
// come in is laid out by expert for the first GEMM.
//
//   dispatch_send    reads the staged inputs, writes block `rank` of every peer's recv_ regions,
//                    and raises dispatch_flags[rank] there: {call, tokens sent}
//   dispatch_count   waits for all ranks' flags, counts rows by expert, chunk by chunk; left out
//                    where there are so few entries that each block of the next kernel counts all
//   dispatch_expand  reads recv_, writes rows, row_scales, row_slot, slot_row, expert_offsets
//
// Rows of an expert lie in the order (source rank, token, slot), whatever came in first.
// Floors: wire bytes over the link's store bandwidth for the first; written rows (H * 2 bytes each)
// over memory bandwidth for the last.
#pragma once

#include "comm/call.cuh"
#include "comm/copy.cuh"
#include "comm/decode.cuh"

namespace megamoe::comm {

MEGAMOE_HD int64_t send_shared_bytes(const View& v) {
  return 4 * (v.world_size + 2 * kBatch * v.top_k);
}

// Tokens of a thread that count_owners looks at in turn.
constexpr int kOwnersEach = 4;

// Adds to sent[W] how many of the tokens 0..end go to each rank. `ahead`: the first kOwnersEach words
// of this thread, loaded before it is known how many of them count. Block-wide; barriers are the
// caller's.
__device__ __forceinline__ void count_owners(const View& v, uint4 ahead, int end, int* sent) {
  constexpr int kEach = kOwnersEach;
  constexpr int kTurn = kThreads * kEach;
  const int lane = threadIdx.x % 32;
  const int ranks = static_cast<int>(v.world_size);
#pragma unroll 1
  for (int word = 0; word < v.owner_words(); ++word) {
    int mine = 0;
#pragma unroll 1
    for (int t = threadIdx.x * kEach; t - lane * kEach < end; t += kTurn) {
      uint4 four = ahead;
      if (word > 0 || t >= kTurn) four = t < end ? load_16(v.owners_of(word) + t) : uint4{};
      const uint32_t masks[kEach] = {t < end ? four.x : 0, t + 1 < end ? four.y : 0,
                                     t + 2 < end ? four.z : 0, t + 3 < end ? four.w : 0};
#pragma unroll 1
      for (int d = 0; d < min(32, ranks - word * 32); ++d) {
        int count = 0;
#pragma unroll
        for (uint32_t mask : masks) count += population(__ballot_sync(~0u, mask >> d & 1));
        if (lane == d) mine += count;
      }
    }
    if (mine) atomicAdd(sent + word * 32 + lane, mine);
  }
}

// Gives token t of `count` from `begin` on its places in the blocks of the ranks that it goes to: the
// j-th of them, in ascending order, is rank[t * K + j], and place[t * K + j] the place there, or -1
// after the last. sent[W] counts on. One warp.
__device__ __forceinline__ void place_tokens(const View& v, int begin, int count, int* sent,
                                             int* rank, int* place) {
  const int lane = threadIdx.x % 32;
  const int ranks = static_cast<int>(v.world_size);
  const int top_k = static_cast<int>(v.top_k);
#pragma unroll 1
  for (int first = 0; first < count; first += 32) {
    const int t = first + lane;
    int at = t * top_k;
#pragma unroll 1
    for (int word = 0; word < v.owner_words(); ++word) {
      const uint32_t mask = t < count ? load_4(v.owners_of(word) + begin + t) : 0;
#pragma unroll 1
      for (int d = 0; d < min(32, ranks - word * 32); ++d) {
        const uint32_t going = __ballot_sync(~0u, mask >> d & 1);
        if (!going) continue;
        const int r = word * 32 + d;
        const int before = sent[r];
        if (mask >> d & 1) {
          rank[at] = r;
          place[at++] = before + population(going & lanes_below(lane));
        }
        __syncwarp();
        if (lane == 0) sent[r] = before + population(going);
        __syncwarp();
      }
    }
#pragma unroll 1
    while (t < count && at < (t + 1) * top_k) place[at++] = -1;
  }
}

// `with_weights`: the slots' weights travel too, for a combine that adds up before it sends.
__global__ void __launch_bounds__(kThreads, 2)
    dispatch_send(const __grid_constant__ View v, int with_weights) {
  extern __shared__ int shared[];
  const int ranks = static_cast<int>(v.world_size);
  const int top_k = static_cast<int>(v.top_k);
  int* sent = shared;
  int* rank = shared + ranks;
  int* place = rank + kBatch * top_k;
  // The thread that raises rank r's flag, and in the last block the value that it has.
  const int r = threadIdx.x;
  const bool last_block = blockIdx.x + 1 == gridDim.x;
  int32_t* total = View::local<int32_t>(v.send_counts);

  const uint64_t call = last_call(v) + 1;
  uint64_t from = 0;
  if (last_block && r < ranks) {
    const uint64_t own = load_relaxed_sys(v.mine<uint64_t>(v.dispatch_flags) + v.rank);
    from = make_flag(flag_call(own), load_relaxed_gpu(total + r));
  }
  if (r < ranks) sent[r] = 0;
  const bool failed = call_failed(v);
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (failed) return;
  const int mine = threadIdx.x * kOwnersEach;
  const uint4 ahead = mine < v.max_tokens ? load_16(v.owners_of(0) + mine) : uint4{};
  const int staged = num_staged(v);

  const int64_t* peers = View::local<const int64_t>(v.peers);
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const Chunk chunk = chunk_of(staged, gridDim.x, blockIdx.x);
  const int x_bytes = static_cast<int>(v.x_bytes());
  const int sf_bytes = static_cast<int>(v.sf_bytes());
  const int64_t block = v.rank * v.max_tokens;  // this rank's block of a recv_ region, in tokens

  count_owners(v, ahead, chunk.begin, sent);

#pragma unroll 1
  for (int first = chunk.begin; first < chunk.end; first += kBatch) {
    const int count = min(kBatch, chunk.end - first);
    __syncthreads();
    if (warp == 0) place_tokens(v, first, count, sent, rank, place);
    __syncthreads();

    // A warp takes a part of a token's row, or what goes with the row. Where warps would stand idle
    // the parts are smaller.
    const int part_bytes = count * ((x_bytes + kPart - 1) / kPart) < kWarps ? kPart / 4 : kPart;
    const int parts = (x_bytes + part_bytes - 1) / part_bytes;
#pragma unroll 1
    for (int unit = warp; unit < count * (parts + 1); unit += kWarps) {
      const int t = unit / (parts + 1);
      const int part = unit % (parts + 1);
      const int64_t token = first + t;
      const int there = lane < top_k ? place[t * top_k + lane] : -1;
      const int64_t peer = there >= 0 ? peers[rank[t * top_k + lane]] : 0;
      const int going = population(__ballot_sync(~0u, there >= 0));  // the lanes from 0 on

      const auto to_each = [&](int64_t region, int64_t row_bytes) {
        return [=](auto&& store) {
#pragma unroll 1
          for (int j = 0; j < going; ++j) {
            const int64_t base = __shfl_sync(~0u, peer, j);
            const int64_t row = block + __shfl_sync(~0u, there, j);
            store(View::at<char>(base, region) + row * row_bytes);
          }
        };
      };
      // Every lane takes part in the shuffles of to_each, also where its own pieces have run out.
      if (part < parts) {
        copy_row(v.mine<const char>(v.x) + token * x_bytes, x_bytes, part * part_bytes,
                 min(x_bytes, (part + 1) * part_bytes), lane, to_each(v.recv_x, x_bytes));
        continue;
      }
      const int32_t* ids = v.mine<const int32_t>(v.topk_idx) + token * top_k;
      const float* weights = v.mine<const float>(v.topk_weights) + token * top_k;
      const int id = lane < top_k ? ids[lane] : -1;
      const float weight = with_weights && lane < top_k ? weights[lane] : 0.f;
      const float scale = sf_bytes ? v.mine<const float>(v.x_scales)[token] : 0.f;
      if (sf_bytes) {
        copy_row(v.mine<const char>(v.x_sf) + token * sf_bytes, sf_bytes, 0, sf_bytes, lane,
                 to_each(v.recv_x_sf, sf_bytes));
      }
#pragma unroll 1
      for (int j = 0; j < going; ++j) {
        const int64_t base = __shfl_sync(~0u, peer, j);
        const int64_t row = block + __shfl_sync(~0u, there, j);
        if (lane < top_k) {
          View::at<int32_t>(base, v.recv_topk_idx)[row * top_k + lane] = id;
          if (with_weights) View::at<float>(base, v.recv_topk_weights)[row * top_k + lane] = weight;
        }
        if (lane == 0) {
          View::at<int32_t>(base, v.recv_token)[row] = static_cast<int32_t>(token);
          if (sf_bytes) View::at<float>(base, v.recv_x_scales)[row] = scale;
        }
      }
    }
  }

  __syncthreads();
  if (r >= ranks) return;
  uint64_t step = kStep;
  if (last_block) {
    // The last chunk ends where the tokens end: its counts are those of the whole call.
    step = last_step(from, make_flag(call, sent[r]), gridDim.x);
    total[r] = sent[r];
  }
  add_to_flag(v, v.dispatch_flags, r, step);
}

// Of entry i, slot i % K of received token i / K, this rank's number of the expert, or -1.
__device__ __forceinline__ int local_expert(const View& v, const int* prefix, int i) {
  const int top_k = static_cast<int>(v.top_k);
  const int source = source_of(prefix, static_cast<int>(v.world_size), i, top_k);
  const int64_t at = (source * v.max_tokens - prefix[source]) * top_k + i;
  const uint32_t id = load_4(v.mine<const int32_t>(v.recv_topk_idx) + at);
  return v.experts().local(static_cast<int>(id), static_cast<int>(v.rank));
}

MEGAMOE_HD int64_t count_shared_bytes(const View& v) {
  return 4 * (v.world_size + 1 + v.local_experts());
}

__global__ void __launch_bounds__(kThreads, 2) dispatch_count(const __grid_constant__ View v) {
  extern __shared__ int shared[];
  const int ranks = static_cast<int>(v.world_size);
  const int top_k = static_cast<int>(v.top_k);
  const int experts = v.local_experts();
  int* prefix = shared;
  int* found = prefix + ranks + 1;

#pragma unroll 1
  for (int e = threadIdx.x; e < experts; e += kThreads) found[e] = 0;
  const bool ok = wait_for_flags(v, v.dispatch_flags, kDispatch, last_call(v) + 1, prefix);
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (!ok) return;
  sum_up(prefix, ranks);

  const Chunk chunk = chunk_of(prefix[ranks], gridDim.x, blockIdx.x);
  const int entries = (chunk.end - chunk.begin) * top_k;
  for (int i = threadIdx.x; i < entries; i += kThreads) {
    const int e = local_expert(v, prefix, chunk.begin * top_k + i);
    if (e >= 0) atomicAdd(found + e, 1);
  }
  __syncthreads();
  int32_t* counts = View::local<int32_t>(v.chunk_counts) + static_cast<int64_t>(blockIdx.x) * experts;
#pragma unroll 1
  for (int e = threadIdx.x; e < experts; e += kThreads) counts[e] = found[e];
}

MEGAMOE_HD int64_t expand_shared_bytes(const View& v) {
  return 4 * (v.world_size + 1 + 2 * v.local_experts() + kBatch * v.top_k);
}

// What dispatch_count found: first[e] += rows of expert e in the chunks before this block's,
// total[e] += rows in all chunks. Block-wide; barriers are the caller's.
__device__ __forceinline__ void add_counts(const View& v, int* first, int* total) {
  const int lane = threadIdx.x % 32;
  const int experts = v.local_experts();
  const int32_t* counts = View::local<const int32_t>(v.chunk_counts);
  for (int e = lane; e < experts; e += 32) {
    int before = 0;
    int all = 0;
#pragma unroll 8
    for (int chunk = threadIdx.x / 32; chunk < gridDim.x; chunk += kWarps) {
      const int n = counts[static_cast<int64_t>(chunk) * experts + e];
      all += n;
      if (chunk < blockIdx.x) before += n;
    }
    if (all) atomicAdd(total + e, all);
    if (before) atomicAdd(first + e, before);
  }
}

// The same from the received entries themselves, of which 0..begin come before this block's; what
// local_expert says of the `count` after them it leaves in `entry`.
__device__ __forceinline__ void count_entries(const View& v, const int* prefix, int begin, int count,
                                              int* first, int* total, int* entry) {
  constexpr int kInFlight = 4;
  const int top_k = static_cast<int>(v.top_k);
  const int max_tokens = static_cast<int>(v.max_tokens);
  const int first_expert = static_cast<int>(v.rank * v.experts_per_rank);
  const int32_t* ids = v.mine<const int32_t>(v.recv_topk_idx);
  const int entries = prefix[v.world_size] * top_k;
  // Of entry i, which is element before + i of `ids`. It only goes up, so it needs no search.
  int source = 0;
  int source_end = prefix[1] * top_k;
  int before = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < entries; i += kInFlight * kThreads) {
    int e[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int at = i + j * kThreads;
      e[j] = -1;
      if (at >= entries) continue;
#pragma unroll 1
      while (at >= source_end) {
        ++source;
        before = (source * max_tokens - prefix[source]) * top_k;
        source_end = prefix[source + 1] * top_k;
      }
      e[j] = static_cast<int>(load_4(ids + before + at)) - first_expert;
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int from_begin = i + j * kThreads - begin;
      const bool here = static_cast<uint32_t>(e[j]) < static_cast<uint32_t>(v.experts_per_rank);
      if (from_begin >= 0 && from_begin < count) entry[from_begin] = here ? e[j] : -1;
      if (!here) continue;
      atomicAdd(total + e[j], 1);
      if (from_begin < 0) atomicAdd(first + e[j], 1);
    }
  }
}

// Turns counts into rows: first[e] += rows of the experts before e. Block 0 writes expert_offsets
// and adds to `stats`, int64 or int32 [L] or null. One warp.
__device__ __forceinline__ void find_first_rows(const View& v, int* first, const int* total,
                                                void* stats, int stats_bytes) {
  const int lane = threadIdx.x % 32;
  const int experts = v.local_experts();
  int32_t* offsets = View::local<int32_t>(v.expert_offsets);
  int sum = 0;
#pragma unroll 1
  for (int e0 = 0; e0 < experts; e0 += 32) {
    const int e = e0 + lane;
    const int n = e < experts ? total[e] : 0;
    int up_to = n;
    for (int d = 1; d < 32; d *= 2) {
      const int other = __shfl_up_sync(~0u, up_to, d);
      if (lane >= d) up_to += other;
    }
    if (e < experts) {
      first[e] += sum + up_to - n;
      if (blockIdx.x == 0) {
        offsets[e] = sum + up_to - n;
        if (stats && stats_bytes == 8) static_cast<int64_t*>(stats)[e] += n;
        if (stats && stats_bytes == 4) static_cast<int32_t*>(stats)[e] += n;
      }
    }
    sum += __shfl_sync(~0u, up_to, 31);
  }
  if (blockIdx.x == 0 && lane == 0) offsets[experts] = sum;
}

// Turns local experts into rows: entry[i] >= 0 becomes the next row of that expert, in the order of
// i. One warp.
__device__ __forceinline__ void place_rows(int* entry, int count, int* next) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int first = 0; first < count; first += 32) {
    const int i = first + lane;
    const int e = i < count ? entry[i] : -1;
    const uint32_t same = __match_any_sync(~0u, e);
    const int row = e >= 0 ? next[e] + population(same & lanes_below(lane)) : -1;
    __syncwarp();
    if (e >= 0 && (same & lanes_below(lane)) == 0) next[e] += population(same);
    __syncwarp();
    if (i < count) entry[i] = row;
  }
}

// Rows by lane (megamoe_ep/prepack/sm90.py: column_order): piece 4b + x of eight pieces of 8 elements has
// pair x of pieces b, 2 + b, 4 + b and 6 + b of the plain row. Which of those lane 4b + c is to load:
__device__ __forceinline__ int piece_by_lane(int piece) {
  return (piece & ~7) + 2 * (piece % 4) + piece / 4 % 2;
}

// Then lanes of four exchange: word c of lane x becomes word x of lane c.
__device__ __forceinline__ void exchange_pairs(uint4& piece) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
  const auto swap = [](uint32_t& low, uint32_t& other, bool second, int lanes) {
    const uint32_t got = __shfl_xor_sync(~0u, second ? low : other, lanes);
    (second ? low : other) = got;
  };
  swap(piece.x, piece.y, odd, 1);
  swap(piece.z, piece.w, odd, 1);
  swap(piece.x, piece.z, high, 2);
  swap(piece.y, piece.w, high, 2);
}

// What one warp lays out at a time: pieces of a received token's row, of 8 elements each, a lane's 32
// apart. Loaded before it is known where they go.
struct RowPart {
  static constexpr int kPieces = 4;
  static constexpr int kElements = 32 * kPieces * 8;

  uint4 piece[kPieces];  // bf16; or in x the codes and in y the scale
  uint32_t token_scale;  // with the first part

  __device__ __forceinline__ void load(const View& v, int64_t token, int part, int first,
                                       int pieces) {
    const char* x = v.mine<const char>(v.recv_x) + token * v.x_bytes();
    if (v.nvfp4) {
      const char* sf = v.mine<const char>(v.recv_x_sf) + token * v.sf_bytes();
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        if (first + 32 * i >= pieces) continue;
        piece[i].x = load_4(x + first * 4 + 128 * i);
        piece[i].y = load_1(sf + (first >> 1) + 16 * i);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        if (first + 32 * i < pieces) piece[i] = load_16(x + first * 16 + 512 * i);
      }
    }
    if (v.nvfp4 && part == 0) token_scale = load_4(v.mine<const float>(v.recv_x_scales) + token);
  }
};

// Must have as many blocks as dispatch_count, unless it does the counting itself (`count_here`).
__global__ void __launch_bounds__(kThreads, 2)
    dispatch_expand(const __grid_constant__ View v, int count_here, int by_lane, void* stats,
                    int stats_bytes) {
  extern __shared__ int shared[];
  const int ranks = static_cast<int>(v.world_size);
  const int top_k = static_cast<int>(v.top_k);
  const int experts = v.local_experts();
  const int hidden = static_cast<int>(v.hidden_size);
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  int* prefix = shared;
  int* next = prefix + ranks + 1;
  int* total = next + experts;
  int* entry = total + experts;

#pragma unroll 1
  for (int e = threadIdx.x; e < experts; e += kThreads) next[e] = total[e] = 0;
  const uint64_t call = last_call(v) + 1;
  bool ok;
  if (count_here) {
    ok = wait_for_flags(v, v.dispatch_flags, kDispatch, call, prefix);
  } else {
    wait_for_previous_kernel();
    ok = !call_failed(v);
    read_counts(v, v.dispatch_flags, prefix);
  }
  if (ok) {
    // Not before all ranks are here: the GEMM would lie in wait on SMs that other streams may want.
    let_next_kernel_start();
    sum_up(prefix, ranks);
    const Chunk chunk = chunk_of(prefix[ranks], gridDim.x, blockIdx.x);
    char* rows = View::local<char>(v.rows);
    const int64_t row_bytes = 2 * static_cast<int64_t>(hidden);
    const int pieces = hidden / 8;
    const int parts = (hidden + RowPart::kElements - 1) / RowPart::kElements;

    int first = chunk.begin;
#pragma unroll 1
    do {
      const int count = min(kBatch, chunk.end - first);
      const auto load = [&](RowPart& row_part, int unit) {
        if (unit >= count * parts) return;
        const Received r = received_token(prefix, ranks, first + unit / parts);
        const int at = unit % parts * 32 * RowPart::kPieces + lane;
        row_part.load(v, r.source * v.max_tokens + r.index, unit % parts,
                      by_lane ? piece_by_lane(at) : at, pieces);
      };
      RowPart ahead = {};
      load(ahead, warp);
      if (first == chunk.begin && count_here) {
        count_entries(v, prefix, first * top_k, count * top_k, next, total, entry);
      } else {
        if (first == chunk.begin) add_counts(v, next, total);
#pragma unroll 1
        for (int i = threadIdx.x; i < count * top_k; i += kThreads) {
          entry[i] = local_expert(v, prefix, first * top_k + i);
        }
      }
      __syncthreads();
      if (warp == 0) {
        if (first == chunk.begin) find_first_rows(v, next, total, stats, stats_bytes);
        __syncwarp();
        place_rows(entry, count * top_k, next);
      }
      __syncthreads();

#pragma unroll 1
      for (int unit = warp; unit < count * parts; unit += kWarps) {
        const int t = unit / parts;
        const int part = unit % parts;
        const Received r = received_token(prefix, ranks, first + t);
        const int row = lane < top_k ? entry[t * top_k + lane] : -1;
        const uint32_t here = __ballot_sync(~0u, row >= 0);
        RowPart now = ahead;
        load(ahead, unit + kWarps);
#pragma unroll
        for (uint4& piece : now.piece) {
          if (v.nvfp4) piece = decode_8(piece.x, piece.y);
          if (by_lane) exchange_pairs(piece);
        }
        const int at = part * 32 * RowPart::kPieces + lane;
#pragma unroll 1
        for (uint32_t left = here; left; left &= left - 1) {
          char* to = rows + __shfl_sync(~0u, row, __ffs(left) - 1) * row_bytes;
#pragma unroll
          for (int i = 0; i < RowPart::kPieces; ++i) {
            if (at + 32 * i < pieces) store_16(to + (at + 32 * i) * 16, now.piece[i]);
          }
        }
        if (part == 0 && lane < top_k) {
          const int64_t slot = slot_index(r.source, r.index, lane, v.max_tokens, top_k);
          View::local<int32_t>(v.slot_row)[slot] = row;
          if (row >= 0) {
            View::local<int32_t>(v.row_slot)[row] = static_cast<int32_t>(slot);
            if (v.nvfp4) View::local<uint32_t>(v.row_scales)[row] = now.token_scale;
          }
        }
      }
      __syncthreads();
      first += kBatch;
    } while (first < chunk.end);
  } else if (blockIdx.x == 0) {
    // The GEMMs that follow find no rows.
#pragma unroll 1
    for (int e = threadIdx.x; e <= experts; e += kThreads) {
      View::local<int32_t>(v.expert_offsets)[e] = 0;
    }
  }

  // The call is counted by the block that is the last to end: all have read the number by then, and
  // dispatch_send has ended.
  if (threadIdx.x != 0) return;
  wait_for_previous_kernel();
  uint32_t* expanded = View::local<uint32_t>(v.latches) + kExpanded;
  if (add_acquire_gpu(expanded, 1u) + 1 != gridDim.x) return;
  *expanded = 0;
  *v.mine<uint64_t>(v.epoch) = call;
}

}  // namespace megamoe::comm
