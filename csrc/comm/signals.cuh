// Flags between ranks: raised after the rows they stand for, waited for with a deadline.
//
// Order. Sender: every thread of a block stores, the block meets at a barrier, one thread a flag adds
// to it with release at system scope. Receiver: one thread a flag polls with acquire until all blocks
// have added, the block meets at a barrier, then any thread reads the rows with ordinary coherent
// loads (never through the read-only path).
#pragma once

#include <cstdint>

#include "comm/ptx.cuh"
#include "comm/view.cuh"

namespace megamoe::comm {

constexpr int kAbortWords = 8;  // a record: {set, phase, epoch, seen, four words of ranks}

__device__ __forceinline__ uint64_t* abort_record(const View& v, int64_t base, int finder) {
  return View::at<uint64_t>(base, v.abort) + finder * kAbortWords;
}

// Whether a call on this buffer has failed, as far as this thread looks: finders first, first +
// step, ... . Returns 1 + the finder, or 0.
__device__ __forceinline__ int look_for_abort(const View& v, int first, int step) {
  for (int f = first; f < v.world_size; f += step) {
    if (load_acquire_sys(abort_record(v, v.memory, f))) return f + 1;
  }
  return 0;
}

// Copies the record of `finder` to the host, once for this buffer.
__device__ __noinline__ void report_abort(const View& v, int finder) {
  if (atomicExch(View::local<uint32_t>(v.latches) + kReported, 1u)) return;
  const uint64_t* record = abort_record(v, v.memory, finder);
  uint64_t* status = View::local<uint64_t>(v.status);
  for (int i = 1; i < kAbortWords; ++i) store_relaxed_sys(status + i, load_relaxed_sys(record + i));
  fence_sys();
  store_relaxed_sys(status + kAbortFinder, finder + 1);
}

// A set of ranks, one bit each.
struct RankSet {
  uint64_t words[4] = {0, 0, 0, 0};

  __device__ __forceinline__ bool has(int rank) const { return words[rank >> 6] >> (rank & 63) & 1; }
  __device__ __forceinline__ void add(int rank) { words[rank >> 6] |= 1ull << (rank & 63); }
  __device__ __forceinline__ void remove(int rank) { words[rank >> 6] &= ~(1ull << (rank & 63)); }
  // The lowest rank, or -1.
  __device__ __forceinline__ int first() const {
    for (int word = 0; word < 4; ++word) {
      if (words[word]) return word * 64 + __ffsll(static_cast<long long>(words[word])) - 1;
    }
    return -1;
  }
};

// Ranks whose flag at the rank with memory `base` is not of `call`. Equality, not order: a peer is
// at most one call ahead, and never of a flag that is still waited for, so 32 bits may wrap around.
__device__ __forceinline__ RankSet late_ranks(const View& v, int64_t base, int64_t flags,
                                              uint64_t call) {
  RankSet late;
  for (int r = 0; r < v.world_size; ++r) {
    const uint64_t flag = load_acquire_sys(View::at<uint64_t>(base, flags) + r);
    if (flag_call(flag) != static_cast<uint32_t>(call)) late.add(r);
  }
  return late;
}

// Of the ranks that are late, and of those that they wait for, the ones that wait for nobody.
__device__ __noinline__ RankSet blame(const View& v, RankSet late) {
  const int64_t* peers = View::local<const int64_t>(v.peers);
  RankSet blamed, looked_at, pending = late;
  looked_at.add(static_cast<int>(v.rank));
  for (int r = pending.first(); r >= 0; r = pending.first()) {
    pending.remove(r);
    if (looked_at.has(r)) continue;
    looked_at.add(r);
    const uint64_t progress = load_acquire_sys(View::at<uint64_t>(peers[r], v.progress));
    RankSet waits_for;
    if (progress) {
      const int64_t flags = (progress & 255) == kDispatch + 1 ? v.dispatch_flags : v.combine_flags;
      waits_for = late_ranks(v, peers[r], flags, progress >> 8);
    }
    if (waits_for.first() < 0) {
      blamed.add(r);
      continue;
    }
    for (int word = 0; word < 4; ++word) pending.words[word] |= waits_for.words[word];
  }
  return blamed.first() < 0 ? late : blamed;
}

// The deadline of this thread passed: tells every rank who is held responsible, once for this
// buffer. Does nothing if the last flag came in just now, or if another rank has told already:
// whoever stops waiting tells everyone first, so no rank is blamed for having given up.
__device__ __noinline__ void give_up(const View& v, int64_t flags, Phase phase, uint64_t call) {
  uint32_t* latch = View::local<uint32_t>(v.latches) + kGivenUp;
  if (atomicExch(latch, 1u)) return;
  const RankSet late = late_ranks(v, v.memory, flags, call);
  if (late.first() < 0) {
    atomicExch(latch, 0u);
    return;
  }
  const RankSet blamed = blame(v, late);
  if (look_for_abort(v, 0, 1)) return;
  const uint32_t seen = flag_call(load_acquire_sys(v.mine<uint64_t>(flags) + blamed.first()));
  const uint64_t behind = static_cast<uint32_t>(static_cast<uint32_t>(call) - seen);
  const uint64_t record[kAbortWords] = {1,
                                        static_cast<uint64_t>(phase),
                                        call,
                                        call > behind ? call - behind : 0,
                                        blamed.words[0],
                                        blamed.words[1],
                                        blamed.words[2],
                                        blamed.words[3]};
  const int self = static_cast<int>(v.rank);
  const int ranks = static_cast<int>(v.world_size);
  const int64_t* peers = View::local<const int64_t>(v.peers);
  for (int r = 0; r < ranks; ++r) {
    uint64_t* there = abort_record(v, peers[r], self);
#pragma unroll
    for (int i = 1; i < kAbortWords; ++i) store_relaxed_sys(there + i, record[i]);
  }
  fence_sys();
  for (int r = 0; r < ranks; ++r) store_release_sys(abort_record(v, peers[r], self), record[0]);
}

// Block-wide: whether an earlier kernel or call on this buffer failed; then this kernel has nothing
// to do. Ends with a barrier.
__device__ __forceinline__ bool call_failed(const View& v) {
  const int finder = look_for_abort(v, threadIdx.x, blockDim.x);
  if (finder) report_abort(v, finder - 1);
  return __syncthreads_or(finder);
}

// Block-wide: waits until every rank has raised its flag of `call`, and leaves the counts that the
// flags carry in counts[W] (shared memory). False: the deadline passed, or this rank or another gave
// up, now or earlier; then an abort record lies in this rank's memory, so every later kernel of this
// buffer ends at once too. Ends with a barrier.
//
// Every block of a grid may wait here whatever the grid's size: what is waited for is made by the
// kernel before this one in the stream, on this rank and on the others, never by a block of this
// grid. That kernel lets this one start once all its blocks run, so none of them needs the room that
// is taken here.
__device__ __forceinline__ bool wait_for_flags(const View& v, int64_t flags, Phase phase,
                                               uint64_t call, int* counts) {
  bool ok = true;
  uint64_t* progress = blockIdx.x == 0 && threadIdx.x == 0 ? v.mine<uint64_t>(v.progress) : nullptr;
  if (progress) store_relaxed_sys(progress, call << 8 | (phase + 1));
  const uint64_t start = globaltimer_ns();
  for (int r = threadIdx.x; r < v.world_size; r += blockDim.x) {
    const uint64_t* mine = v.mine<uint64_t>(flags) + r;
    // Both are on their way at once. Of an abort once more, with acquire, before its record is read.
    const uint64_t told = load_relaxed_sys(abort_record(v, v.memory, r));
    uint64_t flag = load_acquire_sys(mine);
    if (told && load_acquire_sys(abort_record(v, v.memory, r))) {
      report_abort(v, r);
      ok = false;
    }
    for (uint32_t polls = 1; ok && flag_call(flag) != static_cast<uint32_t>(call); ++polls) {
      if (polls % 64 == 0) {
        if (const int finder = look_for_abort(v, 0, 1)) {
          report_abort(v, finder - 1);
          ok = false;
        } else if (globaltimer_ns() - start > static_cast<uint64_t>(v.timeout_ns)) {
          give_up(v, flags, phase, call);  // the next look finds the record, this rank's or another's
        }
      }
      flag = load_acquire_sys(mine);
    }
    counts[r] = static_cast<int>(flag_count(flag));
  }
  const bool all = __syncthreads_and(ok);
  if (progress && all) store_relaxed_sys(progress, 0);
  return all;
}

// Adds this block to this rank's flag at rank r, by a thread that has met the others at a barrier
// after their last stores. `step` is kStep, or last_step in the last block.
__device__ __forceinline__ void add_to_flag(const View& v, int64_t flags, int r, uint64_t step) {
  const int64_t peer = View::local<const int64_t>(v.peers)[r];
  add_release_sys(View::at<uint64_t>(peer, flags) + v.rank, step);
}

// For measuring a flag: stores `first`, `first` + 1, ... `there`, and waits each time until as much has
// come `here`, or until the deadline. One thread.
__global__ void flag_rounds(uint64_t* there, const uint64_t* here, uint64_t first, int rounds,
                            int64_t timeout_ns) {
  const uint64_t start = globaltimer_ns();
  for (uint64_t number = first; number < first + rounds; ++number) {
    store_release_sys(there, number);
    while (load_acquire_sys(here) < number) {
      if (globaltimer_ns() - start > static_cast<uint64_t>(timeout_ns)) return;
    }
  }
}

}  // namespace megamoe::comm
