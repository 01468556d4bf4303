// Dispatch: every staged token goes once to each rank that owns one of its experts, and what has
// come in is laid out by expert for the first GEMM.
//
//   dispatch_send    reads the staged inputs, writes block `rank` of every peer's recv_ regions,
//                    and raises dispatch_flags[rank] there: {call, tokens sent}
//   dispatch_count   waits for all ranks' flags, counts rows by expert, chunk by chunk; left out
//                    where there are so few entries that each block of the next kernel counts all
//   dispatch_expand  reads recv_, writes rows, row_scales, row_home, slot_row, expert_offsets
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
  for (int i = lane; i < count * top_k; i += 32) place[i] = -1;
  __syncwarp();
#pragma unroll 1
  for (int first = 0; first < count; first += 32) {
    const int t = first + lane;
    int at = t * top_k;
#pragma unroll 1
    for (int word = 0; word < v.owner_words(); ++word) {
      const uint32_t mask = t < count ? load_4(v.owners_of(word) + begin + t) : 0;
      const int mine = word * 32 + lane;  // this lane counts what goes to that rank
      int next = mine < ranks ? sent[mine] : 0;
#pragma unroll 1
      for (int d = 0; d < min(32, ranks - word * 32); ++d) {
        const uint32_t going = __ballot_sync(~0u, mask >> d & 1);
        const int before = __shfl_sync(~0u, next, d);
        if (mask >> d & 1) {
          rank[at] = word * 32 + d;
          place[at++] = before + population(going & lanes_below(lane));
        }
        if (lane == d) next += population(going);
      }
      if (mine < ranks) sent[mine] = next;
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
  const int64_t* peers = View::local<const int64_t>(v.peers);
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int64_t near_peer = lane < ranks ? peers[lane] : 0;
  const bool failed = call_failed(v);
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (failed) return;
  const int mine = threadIdx.x * kOwnersEach;
  const uint4 ahead = mine < v.max_tokens ? load_16(v.owners_of(0) + mine) : uint4{};
  const int staged = num_staged(v);

  const Chunk chunk = chunk_of(staged, gridDim.x, blockIdx.x);
  const int x_bytes = static_cast<int>(v.x_bytes());
  const int sf_bytes = static_cast<int>(v.sf_bytes());
  const int64_t block = v.rank * v.max_tokens;  // this rank's block of a recv_ region, in tokens

  // A warp takes a part of a token's row or of its scales, or what else goes with it. Where warps would
  // stand idle the parts are smaller.
  const int tokens = chunk.end - chunk.begin;
  const Rows x_rows(x_bytes, tokens * Rows(x_bytes).parts < kWarps);
  const Rows sf_rows(sf_bytes);
  const int units = x_rows.parts + sf_rows.parts + 1;  // of a token

  count_owners(v, ahead, chunk.begin, sent);

#pragma unroll 1
  for (int first = chunk.begin; first < chunk.end; first += kBatch) {
    const int count = min(kBatch, chunk.end - first);
    Part part;
    int id = -1;
    float weight = 0.f, scale = 0.f;
    const auto load = [&](int unit) {
      if (unit >= count * units) return;
      const int64_t token = first + unit / units;
      const int nth = unit % units;
      if (nth < x_rows.parts) {
        part.load(v.mine<const char>(v.x) + token * x_bytes, x_rows, nth);
      } else if (nth < units - 1) {
        part.load(v.mine<const char>(v.x_sf) + token * sf_bytes, sf_rows, nth - x_rows.parts);
      } else {
        if (lane < top_k) id = v.mine<const int32_t>(v.topk_idx)[token * top_k + lane];
        if (lane < top_k && with_weights) {
          weight = v.mine<const float>(v.topk_weights)[token * top_k + lane];
        }
        if (sf_bytes) scale = v.mine<const float>(v.x_scales)[token];
      }
    };
    // Loaded before it is known where it goes. The warp that finds that out comes last.
    const int turn = kWarps - 1 - warp;
    __syncthreads();
    if (warp == 0) place_tokens(v, first, count, sent, rank, place);
    load(turn);
    __syncthreads();

#pragma unroll 1
    for (int unit = turn; unit < count * units; unit += kWarps) {
      const int t = unit / units;
      const int nth = unit % units;
      const int there = lane < top_k ? place[t * top_k + lane] : -1;
      const int to = there >= 0 ? rank[t * top_k + lane] : 0;
      const int64_t peer = ranks <= 32 ? __shfl_sync(~0u, near_peer, to) : peers[to];
      const int going = population(__ballot_sync(~0u, there >= 0));  // the lanes from 0 on
#pragma unroll 1
      for (int j = 0; j < going; ++j) {
        const int64_t base = __shfl_sync(~0u, peer, j);
        const int64_t row = block + __shfl_sync(~0u, there, j);
        if (nth < x_rows.parts) {
          part.store(View::at<char>(base, v.recv_x) + row * x_bytes, x_rows, nth);
        } else if (nth < units - 1) {
          part.store(View::at<char>(base, v.recv_x_sf) + row * sf_bytes, sf_rows,
                     nth - x_rows.parts);
        } else {
          if (lane < top_k) {
            View::at<int32_t>(base, v.recv_topk_idx)[row * top_k + lane] = id;
            if (with_weights) {
              View::at<float>(base, v.recv_topk_weights)[row * top_k + lane] = weight;
            }
          }
          if (lane == 0) {
            View::at<int32_t>(base, v.recv_token)[row] = first + t;
            if (sf_bytes) View::at<float>(base, v.recv_x_scales)[row] = scale;
          }
        }
      }
      load(unit + kWarps);
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

// An expert's rows in all, and in the upper half of a word those before this block's: few enough
// (binding/comm.cu: kCountHere). In copies, as additions to one word come one after another.
constexpr int kCopies = 4;
using Counts = uint32_t[kCopies];

MEGAMOE_HD int64_t expand_shared_bytes(const View& v) {
  return 4 * ((kCopies + 3) * v.local_experts() + v.world_size + 1 + 2 * kBatch * v.top_k);
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

// A warp's share of the received entries: those of every kWarps-th rank or, with fewer ranks, a part of
// one rank's.
struct EntryShare {
  int source;
  int begin;   // of the source's entries, this lane's first
  int stride;

  // By shifts: divisions would be worked out late, where all wait for them.
  __device__ __forceinline__ EntryShare(int warp, int ranks) {
    static_assert(kWarps == 1 << 4);
    int warps_log2 = 4;  // of a rank
    while (warps_log2 > 0 && ranks << warps_log2 > kWarps) --warps_log2;
    source = warp >> warps_log2;
    begin = (warp & ((1 << warps_log2) - 1)) * 32 + threadIdx.x % 32;
    stride = 32 << warps_log2;
  }
};

// Experts of up to kInFlight of a lane's entries of one rank.
struct Entries {
  static constexpr int kInFlight = 4;
  int expert[kInFlight];

  // Entry `first` of the source and those every `stride` after it, of `end`; -1 where there is none.
  __device__ __forceinline__ void load(const View& v, int source, int first, int stride, int end) {
    const int32_t* ids = v.mine<const int32_t>(v.recv_topk_idx) + source * v.max_tokens * v.top_k;
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int at = first + j * stride;
      expert[j] = at < end ? static_cast<int>(load_4(ids + at)) : -1;
    }
  }
};

// The same as add_counts from the received entries themselves, of which 0..begin come before this
// block's; what local_expert says of the `count` after them it leaves in `entry`. `ahead`: this lane's
// first. Block-wide; barriers are the caller's.
__device__ __forceinline__ void count_entries(const View& v, const EntryShare& share, Entries ahead,
                                              const int* prefix, int begin, int count,
                                              Counts* counts, int* entry) {
  const int ranks = static_cast<int>(v.world_size);
  const int top_k = static_cast<int>(v.top_k);
  const int first_expert = static_cast<int>(v.rank * v.experts_per_rank);
#pragma unroll 1
  for (int source = share.source; source < ranks; source += kWarps) {
    const int before = prefix[source] * top_k - begin;
    const int entries = (prefix[source + 1] - prefix[source]) * top_k;
#pragma unroll 1
    for (int i = share.begin; i < entries; i += Entries::kInFlight * share.stride) {
      if (source != share.source || i != share.begin) ahead.load(v, source, i, share.stride, entries);
#pragma unroll
      for (int j = 0; j < Entries::kInFlight; ++j) {
        const int at = i + j * share.stride;
        const int from_begin = before + at;
        const int e = ahead.expert[j] - first_expert;
        const bool here = static_cast<uint32_t>(e) < static_cast<uint32_t>(v.experts_per_rank);
        if (at < entries && static_cast<uint32_t>(from_begin) < static_cast<uint32_t>(count)) {
          entry[from_begin] = here ? e : -1;
        }
        if (here) atomicAdd(&counts[e][threadIdx.x % kCopies], from_begin < 0 ? 0x10001u : 1u);
      }
    }
  }
}

// Rows of an expert: in all, and before this block's.
struct Count {
  int all;
  int before;
};

__device__ __forceinline__ Count count_of(const Counts& counts) {
  uint32_t sum = 0;
#pragma unroll
  for (uint32_t copy : counts) sum += copy;
  return {static_cast<int>(sum & 0xffffu), static_cast<int>(sum >> 16)};
}

// Turns counts into rows: next[e], the first of this block's rows of expert e. Block 0 writes
// expert_offsets and adds to `stats`, int64 or int32 [L] or null. One warp.
template <typename CountOf>
__device__ __forceinline__ void find_first_rows(const View& v, CountOf&& count_of, int* next,
                                                void* stats, int stats_bytes) {
  const int lane = threadIdx.x % 32;
  const int experts = v.local_experts();
  int32_t* offsets = View::local<int32_t>(v.expert_offsets);
  int sum = 0;
#pragma unroll 1
  for (int e0 = 0; e0 < experts; e0 += 32) {
    const int e = e0 + lane;
    const Count count = e < experts ? count_of(e) : Count{};
    int up_to = count.all;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int other = __shfl_up_sync(~0u, up_to, d);
      if (lane >= d) up_to += other;
    }
    if (e < experts) {
      const int first = sum + up_to - count.all;
      next[e] = first + count.before;
      if (blockIdx.x == 0) {
        offsets[e] = first;
        if (stats && stats_bytes == 8) static_cast<int64_t*>(stats)[e] += count.all;
        if (stats && stats_bytes == 4) static_cast<int32_t*>(stats)[e] += count.all;
      }
    }
    sum += __shfl_sync(~0u, up_to, 31);
  }
  if (blockIdx.x == 0 && lane == 0) offsets[experts] = sum;
}

// Numbers the entries of each expert in the order of i: number[i] are those before entry i, seen[e] all
// up to now. One warp.
__device__ __forceinline__ void number_entries(const int* entry, int count, int* seen, int* number) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int first = 0; first < count; first += 32) {
    const int i = first + lane;
    const int e = i < count ? entry[i] : -1;
    const uint32_t same = __match_any_sync(~0u, e);
    const int before = e >= 0 ? seen[e] : 0;
    __syncwarp();
    if (e >= 0 && (same & lanes_below(lane)) == 0) seen[e] = before + population(same);
    __syncwarp();
    if (i < count) number[i] = before + population(same & lanes_below(lane));
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
  static constexpr int kPieces = 2;
  static constexpr int kElements = 32 * kPieces * 8;

  uint4 piece[kPieces];  // bf16; or in x the codes and in y the scale
  uint32_t token_scale;  // with the first part
  int64_t home;          // likewise: the address of its slots' home rows

  __device__ __forceinline__ void load(const View& v, const Received& r, int part, int first,
                                       int pieces) {
    const int64_t token = r.source * v.max_tokens + r.index;
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
    if (part > 0) return;
    if (v.nvfp4) token_scale = load_4(v.mine<const float>(v.recv_x_scales) + token);
    const int its_number = static_cast<int>(load_4(v.mine<const int32_t>(v.recv_token) + token));
    home = View::local<const int64_t>(v.peers)[r.source] + v.home_rows +
           home_row(its_number, static_cast<int>(v.top_k), 0) * v.home_bytes();
  }
};

// Must have as many blocks as dispatch_count, unless it does the counting itself (`count_here`). Then
// 2^`sharing_log2` blocks have the same tokens and each takes a part of their rows: of few tokens some
// have many experts here, and a block's own would keep it busy twice as long as the mean.
__global__ void __launch_bounds__(kThreads, 2)
    dispatch_expand(const __grid_constant__ View v, int count_here, int sharing_log2, int by_lane,
                    void* stats, int stats_bytes) {
  extern __shared__ int shared[];
  const int ranks = static_cast<int>(v.world_size);
  const int top_k = static_cast<int>(v.top_k);
  const int experts = v.local_experts();
  const int hidden = static_cast<int>(v.hidden_size);
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  Counts* counts = reinterpret_cast<Counts*>(shared);
  int* next = shared + kCopies * experts;
  int* total = next + experts;
  int* seen = total + experts;
  int* prefix = seen + experts;
  int* entry = prefix + ranks + 1;
  int* number = entry + kBatch * top_k;
  const int sharing = 1 << sharing_log2;
  const int chunks = gridDim.x >> sharing_log2;
  const int nth = blockIdx.x >> sharing_log2;
  const int share = blockIdx.x & (sharing - 1);
  const EntryShare entry_share(warp, ranks);

#pragma unroll 1
  for (int i = threadIdx.x; i < (kCopies + 3) * experts; i += kThreads) shared[i] = 0;
  const uint64_t call = last_call(v) + 1;
  bool ok;
  Entries entries_ahead;
  if (count_here) {
    ok = wait_for_flags(v, v.dispatch_flags, kDispatch, call, prefix);
    // On their way while counts are summed up.
    if (ok && entry_share.source < ranks) {
      entries_ahead.load(v, entry_share.source, entry_share.begin, entry_share.stride,
                         prefix[entry_share.source] * top_k);
    }
    __syncthreads();
  } else {
    wait_for_previous_kernel();
    read_counts(v, v.dispatch_flags, prefix);
    ok = !call_failed(v);
  }
  if (ok) {
    // Not before all ranks are here: the GEMM would lie in wait on SMs that other streams may want.
    let_next_kernel_start();
    sum_up(prefix, ranks);
    const int tokens = prefix[ranks];
    const Chunk chunk = nth < chunks ? chunk_of(tokens, chunks, nth) : Chunk{tokens, tokens};
    char* rows = View::local<char>(v.rows);
    const int64_t row_bytes = 2 * static_cast<int64_t>(hidden);
    const int pieces = hidden / 8;
    const int parts = (hidden + RowPart::kElements - 1) / RowPart::kElements;

    // The warps that find out where rows go come last at laying them out.
    const int turn = share + (kWarps - 1 - warp) * sharing;
#pragma unroll 1
    for (int first = chunk.begin;; first += kBatch) {
      const int count = min(kBatch, chunk.end - first);
      const auto load = [&](RowPart& row_part, int unit) {
        if (unit >= count * parts) return;
        const Received r = received_token(prefix, ranks, first + unit / parts);
        const int at = unit % parts * 32 * RowPart::kPieces + lane;
        row_part.load(v, r, unit % parts, by_lane ? piece_by_lane(at) : at, pieces);
      };
      if (first == chunk.begin && count_here) {
        count_entries(v, entry_share, entries_ahead, prefix, first * top_k, count * top_k, counts,
                      entry);
      } else {
        if (first == chunk.begin) add_counts(v, next, total);
#pragma unroll 1
        for (int i = threadIdx.x; i < count * top_k; i += kThreads) {
          entry[i] = local_expert(v, prefix, first * top_k + i);
        }
      }
      __syncthreads();
      if (warp == 0 && first == chunk.begin) {
        const auto count_of_expert = [&](int e) {
          return count_here ? count_of(counts[e]) : Count{total[e], next[e]};
        };
        find_first_rows(v, count_of_expert, next, stats, stats_bytes);
      }
      if (warp == 1) number_entries(entry, count * top_k, seen, number);
      RowPart ahead = {};
      load(ahead, turn);
      __syncthreads();

#pragma unroll 1
      for (int unit = turn; unit < count * parts; unit += kWarps * sharing) {
        const int t = unit / parts;
        const int part = unit % parts;
        const Received r = received_token(prefix, ranks, first + t);
        const int e = lane < top_k ? entry[t * top_k + lane] : -1;
        const int row = e >= 0 ? next[e] + number[t * top_k + lane] : -1;
        const uint32_t here = __ballot_sync(~0u, row >= 0);
        RowPart now = ahead;
        load(ahead, unit + kWarps * sharing);
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
            if (at + 32 * i >= pieces) continue;
            // Few rows are to be in L2 when L1 begins; many would not be, and only be in the way.
            if (count_here) {
              store_16(to + (at + 32 * i) * 16, now.piece[i]);
            } else {
              store_16_passing(to + (at + 32 * i) * 16, now.piece[i]);
            }
          }
        }
        if (part == 0 && lane < top_k) {
          const int64_t slot = slot_index(r.source, r.index, lane, v.max_tokens, top_k);
          View::local<int32_t>(v.slot_row)[slot] = row;
          if (row >= 0) {
            View::local<int64_t>(v.row_home)[row] = now.home + lane * v.home_bytes();
            if (v.nvfp4) View::local<uint32_t>(v.row_scales)[row] = now.token_scale;
          }
        }
      }
      if (first + kBatch >= chunk.end) break;
      __syncthreads();
    }
  } else if (blockIdx.x == 0) {
    // The GEMMs that follow find no rows.
#pragma unroll 1
    for (int e = threadIdx.x; e <= experts; e += kThreads) {
      View::local<int32_t>(v.expert_offsets)[e] = 0;
    }
  }

  // The call is counted once a thread of every block has come here, having read its number, and
  // dispatch_send has ended. Where there are few tokens this one has no row to lay out.
  if (threadIdx.x != 0) return;
  wait_for_previous_kernel();
  uint32_t* blocks = View::local<uint32_t>(v.latches) + kReadCall;
  if (add_acquire_gpu(blocks, 1u) + 1 != gridDim.x) return;
  *blocks = 0;
  *v.mine<uint64_t>(v.epoch) = call;
}

}  // namespace megamoe::comm
