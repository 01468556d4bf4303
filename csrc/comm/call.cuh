// What the kernels of one call have in common.
//
// Every kernel here lets the next one start only after its own wait for the one before, those that
// poll flags once the flags are there. So when a kernel begins, all kernels but the one before it have
// ended, and what they left, and what flags vouch for, can be read before the wait: past the first
// cache, since nothing empties that meanwhile. dispatch and combine may follow each other directly,
// with no GEMM between, and dispatch_send any kernel but dispatch_expand.
#pragma once

#include "comm/offsets.cuh"
#include "comm/signals.cuh"
#include "comm/view.cuh"

namespace megamoe::comm {

// At most 64 registers a thread (__launch_bounds__(kThreads, 2)), so that the next kernel's first
// blocks fit beside this one's last.
//
// Short loops that run once or twice are kept from being unrolled: the GEMMs between two calls drive
// this code out of the caches, and every line of it is then fetched from memory.
constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;

__device__ __forceinline__ int num_staged(const View& v) {
  const int n = static_cast<int>(load_relaxed_gpu(v.mine<const int32_t>(v.num_tokens)));
  return min(max(n, 0), static_cast<int>(v.max_tokens));
}

// Tells the host of an argument that only the device could look at; the first one counts.
__device__ __noinline__ void report_bad_input(const View& v, BadInput what, int token, int slot,
                                              int value) {
  if (atomicExch(View::local<uint32_t>(v.latches) + kBadFound, 1u)) return;
  uint64_t* status = View::local<uint64_t>(v.status);
  store_relaxed_sys(status + kBadToken, static_cast<uint64_t>(token));
  store_relaxed_sys(status + kBadSlot, static_cast<uint64_t>(slot));
  store_relaxed_sys(status + kBadValue, static_cast<uint64_t>(static_cast<int64_t>(value)));
  fence_sys();
  store_relaxed_sys(status + kBadInput, static_cast<uint64_t>(what));
}

// Number of the last call, 1 is the first; dispatch_expand counts on.
__device__ __forceinline__ uint64_t last_call(const View& v) {
  return load_relaxed_sys(v.mine<uint64_t>(v.epoch));
}

// counts[W]: what the flags carry, once they have been waited for by an earlier kernel. After the
// block's next barrier all that they stand for can be read, as if this kernel had waited.
__device__ __forceinline__ void read_counts(const View& v, int64_t flags, int* counts) {
#pragma unroll 1
  for (int r = threadIdx.x; r < v.world_size; r += kThreads) {
    counts[r] = static_cast<int>(flag_count(load_acquire_sys(v.mine<uint64_t>(flags) + r)));
  }
}

// counts[W] -> prefix[W + 1] in place: tokens received from the ranks before each. Block-wide, after a
// barrier and with one at its end.
__device__ __forceinline__ void sum_up(int* counts, int ranks) {
  if (threadIdx.x == 0) {
    int sum = 0;
#pragma unroll 1
    for (int s = 0; s < ranks; ++s) {
      const int n = counts[s];
      counts[s] = sum;
      sum += n;
    }
    counts[ranks] = sum;
  }
  __syncthreads();
}

struct Received {
  int source;
  int index;
};

__device__ __forceinline__ Received received_token(const int* prefix, int ranks, int i) {
  const int source = source_of(prefix, ranks, i);
  return {source, i - prefix[source]};
}

// A warp's number in the grid, such that the first of them lie on different SMs.
__device__ __forceinline__ int64_t warp_of_grid() {
  return static_cast<int64_t>(threadIdx.x / 32) * gridDim.x + blockIdx.x;
}

__device__ __forceinline__ int64_t warps_of_grid() {
  return static_cast<int64_t>(kWarps) * gridDim.x;
}

}  // namespace megamoe::comm
