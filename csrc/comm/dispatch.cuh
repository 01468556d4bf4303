// Dispatch: every staged token goes once to each rank that owns one of its experts, and what has
// come in is laid out by expert for the first GEMM.
//
//   dispatch_send    reads the staged inputs, writes block `rank` of every peer's recv_ regions,
//                    then raises dispatch_flags[rank] there: {call, tokens sent}
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
  return 4 * (v.world_size + 1 + 2 * kBatch * v.top_k);
}

// Adds to sent[W] how many of the tokens 0..end go to each rank. Block-wide; barriers are the
// caller's.
__device__ __forceinline__ void count_owners(const View& v, const int32_t* ids, int end,
                                             int* sent) {
  const int lane = threadIdx.x % 32;
  const int ranks = static_cast<int>(v.world_size);
  const int top_k = static_cast<int>(v.top_k);
  const Experts experts = v.experts();
  for (int word = 0; word * 32 < ranks; ++word) {
    const int in_word = min(32, ranks - word * 32);
    int mine = 0;
    for (int first = threadIdx.x - lane; first < end; first += kThreads) {
      const int t = first + lane;
      const uint32_t mask =
          t < end ? owner_mask(ids + static_cast<int64_t>(t) * top_k, top_k, experts, word) : 0;
      for (int d = 0; d < in_word; ++d) {
        const int count = population(__ballot_sync(~0u, mask >> d & 1));
        if (lane == d) mine += count;
      }
    }
    if (mine) atomicAdd(sent + word * 32 + lane, mine);
  }
}

// Gives each of `count` tokens its place in the blocks of the ranks that it goes to: place[t * K +
// k] for the first slot k of each rank, -1 elsewhere (set before). sent[W] counts on. One warp.
__device__ __forceinline__ void place_tokens(const View& v, const int32_t* ids, int count,
                                             int* sent, int* place) {
  const int lane = threadIdx.x % 32;
  const int ranks = static_cast<int>(v.world_size);
  const int top_k = static_cast<int>(v.top_k);
  const Experts experts = v.experts();
  for (int first = 0; first < count; first += 32) {
    const int t = first + lane;
    for (int word = 0; word * 32 < ranks; ++word) {
      const uint32_t mask = t < count ? owner_mask(ids + t * top_k, top_k, experts, word) : 0;
      for (int d = 0; d < min(32, ranks - word * 32); ++d) {
        const uint32_t going = __ballot_sync(~0u, mask >> d & 1);
        if (!going) continue;
        const int rank = word * 32 + d;
        if (mask >> d & 1) {
          place[t * top_k + first_slot_of(ids + t * top_k, top_k, experts, rank)] =
              sent[rank] + population(going & lanes_below(lane));
        }
        __syncwarp();
        if (lane == 0) sent[rank] += population(going);
        __syncwarp();
      }
    }
  }
}

// `with_weights`: the slots' weights travel too, for a combine that adds up before it sends.
__global__ void __launch_bounds__(kThreads, 2)
    dispatch_send(const __grid_constant__ View v, int with_weights) {
  extern __shared__ int shared[];
  const int ranks = static_cast<int>(v.world_size);
  const int top_k = static_cast<int>(v.top_k);
  int* sent = shared;
  int32_t* ids = shared + ranks;
  int* place = ids + kBatch * top_k;
  uint32_t* blocks_before = reinterpret_cast<uint32_t*>(place + kBatch * top_k);

#pragma unroll 1
  for (int r = threadIdx.x; r < ranks; r += kThreads) sent[r] = 0;
  let_next_kernel_start();
  wait_for_previous_kernel();
  const uint64_t call = current_call(v) + 1;
  const int staged = num_staged(v);
  if (call_failed(v)) return;

  const int64_t* peers = View::local<const int64_t>(v.peers);
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int32_t* all_ids = v.mine<const int32_t>(v.topk_idx);
  const Chunk chunk = chunk_of(staged, gridDim.x, blockIdx.x);
  const int x_bytes = static_cast<int>(v.x_bytes());
  const int sf_bytes = static_cast<int>(v.sf_bytes());
  const int64_t block = v.rank * v.max_tokens;  // this rank's block of a recv_ region, in tokens

  count_owners(v, all_ids, chunk.begin, sent);

  for (int first = chunk.begin; first < chunk.end; first += kBatch) {
    const int count = min(kBatch, chunk.end - first);
#pragma unroll 1
    for (int i = threadIdx.x; i < count * top_k; i += kThreads) {
      ids[i] = all_ids[static_cast<int64_t>(first) * top_k + i];
      place[i] = -1;
    }
    __syncthreads();
    if (warp == 0) place_tokens(v, ids, count, sent, place);
    __syncthreads();

    // A warp takes a part of a token's row, or what goes with the row. Where warps would stand idle
    // the parts are smaller.
    const int part_bytes = count * ((x_bytes + kPart - 1) / kPart) < kWarps ? kPart / 4 : kPart;
    const int parts = (x_bytes + part_bytes - 1) / part_bytes;
    for (int unit = warp; unit < count * (parts + 1); unit += kWarps) {
      const int t = unit / (parts + 1);
      const int part = unit % (parts + 1);
      const int64_t token = first + t;
      const int id = lane < top_k ? ids[t * top_k + lane] : -1;
      const int there = lane < top_k ? place[t * top_k + lane] : -1;
      const int64_t peer = there >= 0 ? peers[v.experts().owner(id)] : 0;
      const uint32_t going = __ballot_sync(~0u, there >= 0);

      const auto to_each = [&](int64_t region, int64_t row_bytes) {
        return [=](auto&& store) {
          for (uint32_t left = going; left; left &= left - 1) {
            const int slot = __ffs(left) - 1;
            const int64_t base = __shfl_sync(~0u, peer, slot);
            const int64_t row = block + __shfl_sync(~0u, there, slot);
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
      const float scale = sf_bytes ? v.mine<const float>(v.x_scales)[token] : 0.f;
      const float weight = with_weights && lane < top_k
                               ? v.mine<const float>(v.topk_weights)[token * top_k + lane]
                               : 0.f;
      if (sf_bytes) {
        copy_row(v.mine<const char>(v.x_sf) + token * sf_bytes, sf_bytes, 0, sf_bytes, lane,
                 to_each(v.recv_x_sf, sf_bytes));
      }
      for (uint32_t left = going; left; left &= left - 1) {
        const int slot = __ffs(left) - 1;
        const int64_t base = __shfl_sync(~0u, peer, slot);
        const int64_t row = block + __shfl_sync(~0u, there, slot);
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
    __syncthreads();
  }

  // The last chunk ends where the tokens end: its counts are those of the whole call.
  int32_t* total = View::local<int32_t>(v.send_counts);
  if (blockIdx.x + 1 == gridDim.x) {
    __syncthreads();
#pragma unroll 1
    for (int r = threadIdx.x; r < ranks; r += kThreads) total[r] = sent[r];
  }
  if (!last_block_to_finish(v, kSendDone, blocks_before)) return;
  for (int r = threadIdx.x; r < ranks; r += kThreads) {
    const uint32_t count = load_relaxed_gpu(reinterpret_cast<uint32_t*>(total) + r);
    store_release_sys(View::at<uint64_t>(peers[r], v.dispatch_flags) + v.rank,
                      make_flag(call, count));
  }
  if (threadIdx.x == 0) {
    *v.mine<uint64_t>(v.epoch) = call;
    View::local<uint32_t>(v.latches)[kSendDone] = 0;
  }
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
  let_next_kernel_start();
  wait_for_previous_kernel();
  const uint64_t call = current_call(v);
  if (call_failed(v)) return;
  if (!wait_for_flags(v, v.dispatch_flags, kDispatch, call, prefix)) return;
  sum_up(prefix, ranks);

  const int32_t* ids = v.mine<const int32_t>(v.recv_topk_idx);
  const Chunk chunk = chunk_of(prefix[ranks], gridDim.x, blockIdx.x);
  const int entries = (chunk.end - chunk.begin) * top_k;
  for (int i = threadIdx.x; i < entries; i += kThreads) {
    const Received r = received_token(prefix, ranks, chunk.begin + i / top_k);
    const int64_t at = slot_index(r.source, r.index, i % top_k, v.max_tokens, top_k);
    const int e = v.experts().local(static_cast<int>(load_4(ids + at)), static_cast<int>(v.rank));
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

// The same from the received ids themselves, of which tokens 0..begin come before this block's.
__device__ __forceinline__ void count_entries(const View& v, const int* prefix, int begin,
                                              int* first, int* total) {
  const int ranks = static_cast<int>(v.world_size);
  const int top_k = static_cast<int>(v.top_k);
  const int32_t* ids = v.mine<const int32_t>(v.recv_topk_idx);
  for (int s = 0; s < ranks; ++s) {
    const int entries = (prefix[s + 1] - prefix[s]) * top_k;
    const int before = (begin - prefix[s]) * top_k;
    const int32_t* from = ids + slot_index(s, 0, 0, v.max_tokens, top_k);
#pragma unroll 4
    for (int i = threadIdx.x; i < entries; i += kThreads) {
      const int e = v.experts().local(static_cast<int>(load_4(from + i)), static_cast<int>(v.rank));
      if (e < 0) continue;
      atomicAdd(total + e, 1);
      if (i < before) atomicAdd(first + e, 1);
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

// Must have as many blocks as dispatch_count, unless it does the counting itself (`count_here`).
__global__ void __launch_bounds__(kThreads, 2)
    dispatch_expand(const __grid_constant__ View v, int count_here, int by_lane, void* stats,
                    int stats_bytes) {
  extern __shared__ int shared[];
  const int ranks = static_cast<int>(v.world_size);
  const int top_k = static_cast<int>(v.top_k);
  const int experts = v.local_experts();
  const int hidden = static_cast<int>(v.hidden_size);
  int* prefix = shared;
  int* next = prefix + ranks + 1;
  int* total = next + experts;
  int* entry = total + experts;
  constexpr int kPieces = 4;  // of 8 elements, 16 bytes of a row, a lane in flight

  wait_for_previous_kernel();
  const uint64_t call = current_call(v);
  bool ok = !call_failed(v);
  if (ok && count_here) ok = wait_for_flags(v, v.dispatch_flags, kDispatch, call, prefix);
  if (!ok) {
    // The GEMMs that follow find no rows.
    if (blockIdx.x == 0) {
#pragma unroll 1
      for (int e = threadIdx.x; e <= experts; e += kThreads) {
        View::local<int32_t>(v.expert_offsets)[e] = 0;
      }
    }
    return;
  }
  // Not before all ranks are here: the GEMM would lie in wait on SMs that other streams may want.
  let_next_kernel_start();
  if (!count_here) read_counts(v, v.dispatch_flags, prefix);
#pragma unroll 1
  for (int e = threadIdx.x; e < experts; e += kThreads) next[e] = total[e] = 0;
  sum_up(prefix, ranks);
  const Chunk chunk = chunk_of(prefix[ranks], gridDim.x, blockIdx.x);
  if (count_here) {
    count_entries(v, prefix, chunk.begin, next, total);
  } else {
    add_counts(v, next, total);
  }
  __syncthreads();
  if (threadIdx.x < 32) find_first_rows(v, next, total, stats, stats_bytes);
  __syncthreads();

  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int32_t* ids = v.mine<const int32_t>(v.recv_topk_idx);
  const char* x = v.mine<const char>(v.recv_x);
  const char* sf = v.mine<const char>(v.recv_x_sf);
  char* rows = View::local<char>(v.rows);
  const int64_t x_bytes = v.x_bytes();
  const int64_t sf_bytes = v.sf_bytes();
  const int64_t row_bytes = 2 * static_cast<int64_t>(hidden);
  const int pieces = hidden / 8;
  const int parts = (pieces + 32 * kPieces - 1) / (32 * kPieces);

  for (int first = chunk.begin; first < chunk.end; first += kBatch) {
    const int count = min(kBatch, chunk.end - first);
#pragma unroll 1
    for (int i = threadIdx.x; i < count * top_k; i += kThreads) {
      const Received r = received_token(prefix, ranks, first + i / top_k);
      const int64_t at = slot_index(r.source, r.index, i % top_k, v.max_tokens, top_k);
      entry[i] = v.experts().local(static_cast<int>(load_4(ids + at)), static_cast<int>(v.rank));
    }
    __syncthreads();
    if (warp == 0) place_rows(entry, count * top_k, next);
    __syncthreads();

    for (int unit = warp; unit < count * parts; unit += kWarps) {
      const int t = unit / parts;
      const int part = unit % parts;
      const Received r = received_token(prefix, ranks, first + t);
      const int64_t token = r.source * v.max_tokens + r.index;
      const int row = lane < top_k ? entry[t * top_k + lane] : -1;
      const uint32_t here = __ballot_sync(~0u, row >= 0);
      const int from = part * 32 * kPieces + lane;

      const int load_from = by_lane ? piece_by_lane(from) : from;
      uint4 piece[kPieces];
      if (v.nvfp4) {
        uint32_t codes[kPieces];
        uint32_t scale[kPieces];
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
          const int at = load_from + 32 * i;
          codes[i] = at < pieces ? load_4(x + token * x_bytes + at * 4) : 0;
          scale[i] = at < pieces ? load_1(sf + token * sf_bytes + at / 2) : 0;
        }
#pragma unroll
        for (int i = 0; i < kPieces; ++i) piece[i] = decode_8(codes[i], scale[i]);
      } else {
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
          const int at = load_from + 32 * i;
          if (at < pieces) piece[i] = load_16(x + token * x_bytes + at * 16);
        }
      }
      if (by_lane) {
#pragma unroll
        for (uint4& mine : piece) exchange_pairs(mine);
      }
      for (uint32_t left = here; left; left &= left - 1) {
        char* to = rows + __shfl_sync(~0u, row, __ffs(left) - 1) * row_bytes;
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
          const int at = from + 32 * i;
          if (at < pieces) store_16(to + at * 16, piece[i]);
        }
      }
      if (part == 0 && lane < top_k) {
        const int64_t slot = token * top_k + lane;
        View::local<int32_t>(v.slot_row)[slot] = row;
        if (row >= 0) {
          View::local<int32_t>(v.row_slot)[row] = static_cast<int32_t>(slot);
          if (v.nvfp4) {
            View::local<float>(v.row_scales)[row] =
                __uint_as_float(load_4(v.mine<const float>(v.recv_x_scales) + token));
          }
        }
      }
    }
    __syncthreads();
  }
}

}  // namespace megamoe::comm
