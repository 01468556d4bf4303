// Flags between ranks: raised after the rows they stand for, waited for with a deadline.
//
// Order. Sender: every thread of a block stores, the block meets at a barrier, one thread fences at
// system scope and counts the block in; the block that is last fences again and stores the flags
// with release. Receiver: one thread a flag polls with acquire, the block meets at a barrier, then
// any thread reads the rows with ordinary coherent loads (never through the read-only path).
#pragma once

#include <cstdint>

#include "comm/view.cuh"

namespace megamoe::comm {

__device__ __forceinline__ uint64_t load_acquire_sys(const uint64_t* p) {
  uint64_t v;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}

__device__ __forceinline__ uint64_t load_relaxed_sys(const uint64_t* p) {
  uint64_t v;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}

__device__ __forceinline__ void store_relaxed_sys(uint64_t* p, uint64_t v) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}

__device__ __forceinline__ void store_release_sys(uint64_t* p, uint64_t v) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}

__device__ __forceinline__ void fence_sys() {
  asm volatile("fence.acq_rel.sys;" ::: "memory");
}

__device__ __forceinline__ uint32_t add_acq_rel_gpu(uint32_t* p, uint32_t v) {
  uint32_t old;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(p), "r"(v)
               : "memory");
  return old;
}

__device__ __forceinline__ uint32_t load_relaxed_gpu(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

__device__ __forceinline__ uint64_t globaltimer_ns() {
  uint64_t t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t)::"memory");
  return t;
}

// Everything that the kernel before this one in the stream has written can be read from here on.
__device__ __forceinline__ void wait_for_previous_kernel() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

// The next kernel's blocks may take what room is left on the SMs; they wait as above.
__device__ __forceinline__ void let_next_kernel_start() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

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

// The deadline of this thread passed: tells every rank which flags of `flags` are missing, once for
// this buffer. Does nothing if the last of them came in just now.
__device__ __noinline__ void give_up(const View& v, int64_t flags, Phase phase, uint32_t call) {
  uint32_t* latch = View::local<uint32_t>(v.latches) + kGivenUp;
  if (atomicExch(latch, 1u)) return;
  const int ranks = static_cast<int>(v.world_size);
  const int64_t* peers = View::local<const int64_t>(v.peers);
  uint64_t late[4] = {0, 0, 0, 0};
  uint32_t seen = 0;
  bool missing = false;
  for (int r = 0; r < ranks; ++r) {
    const uint64_t flag = load_acquire_sys(v.mine<uint64_t>(flags) + r);
    if (flag_call(flag) == call) continue;
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      if (r >> 6 == word) late[word] |= 1ull << (r & 63);
    }
    if (!missing) seen = flag_call(flag);
    missing = true;
  }
  if (!missing) {
    atomicExch(latch, 0u);
    return;
  }
  const uint64_t record[kAbortWords] = {1, static_cast<uint64_t>(phase), call,    seen, late[0],
                                        late[1], late[2], late[3]};
  const int self = static_cast<int>(v.rank);
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
// flags carry in counts[W] (shared memory). False: the deadline passed or another rank gave up.
//
// Every block of a grid may wait here whatever the grid's size: what is waited for is made by the
// kernel before this one in the stream, on this rank and on the others, never by a block of this
// grid, so no block has to be resident for another one to go on.
__device__ __forceinline__ bool wait_for_flags(const View& v, int64_t flags, Phase phase,
                                               uint32_t call, int* counts) {
  bool ok = true;
  const uint64_t start = globaltimer_ns();
  for (int r = threadIdx.x; r < v.world_size; r += blockDim.x) {
    const uint64_t* mine = v.mine<uint64_t>(flags) + r;
    uint64_t flag = load_acquire_sys(mine);
    for (uint32_t polls = 1; flag_call(flag) != call; ++polls) {
      if (polls % 32 == 0) {
        if (const int finder = look_for_abort(v, 0, 1)) {
          report_abort(v, finder - 1);
          ok = false;
          break;
        }
        if (globaltimer_ns() - start > static_cast<uint64_t>(v.timeout_ns)) {
          give_up(v, flags, phase, call);  // the next look finds the record, this rank's or another's
        }
      }
      flag = load_acquire_sys(mine);
    }
    counts[r] = static_cast<int>(flag_count(flag));
  }
  return __syncthreads_and(ok);
}

// Block-wide, after the block's last store to a peer: true in the one block that is the last of the
// grid, where every store of every block is then before whatever this block releases.
__device__ __forceinline__ bool last_block_to_finish(const View& v, Latch latch) {
  __shared__ uint32_t before;
  __syncthreads();
  if (threadIdx.x == 0) {
    fence_sys();
    before = add_acq_rel_gpu(View::local<uint32_t>(v.latches) + latch, 1u);
  }
  __syncthreads();
  return before + 1 == gridDim.x;
}

}  // namespace megamoe::comm
