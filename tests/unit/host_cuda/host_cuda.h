// Just enough of CUDA to run a kernel on the host: each thread of a block is a fiber, blocks run one
// after another. Threads change places only where they meet (barriers, warp exchanges), so a kernel
// behaves the same every time. What races on a GPU shows here only where a test asks what a thread can
// know (`Known`).
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __shared__
#define __noinline__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

using std::max;
using std::min;

struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct Index {
  unsigned x;
};

inline Index threadIdx, blockIdx, gridDim, blockDim;

namespace host_cuda {

constexpr int kMostThreads = 1024;
constexpr int kStackBytes = 64 << 10;

// What a thread knows to be over: of each warp all that it did before so many of its meetings, and whatever
// else a test counts. Kept as vector clocks are: who hears of somebody knows what that one knew.
struct Known {
  static constexpr int kOthers = kMostThreads / 32;  // numbers from here on are the test's own
  std::array<uint32_t, kOthers + 32> of{};

  void hear(const Known& other) {
    for (size_t i = 0; i < of.size(); ++i) of[i] = max(of[i], other.of[i]);
  }
};

// Threads that meet: all of them leave with what each has brought. Two sets of places in turn, since
// the first to leave may come to the next meeting before the last has looked at this one.
struct Meeting {
  int size = 0;
  int arrived = 0;
  uint64_t round = 0;
  uint64_t brought[2][kMostThreads];
  Known known[2];
  uint32_t warps = 0;  // whose threads are here
};

struct Fiber {
  ucontext_t context;
  jmp_buf place;
  bool started = false;
  bool done = false;
  std::unique_ptr<char[]> stack;
};

inline std::vector<Fiber> fibers(kMostThreads);
inline std::vector<Meeting> warps(kMostThreads / 32);
inline std::vector<Meeting> warpgroups(kMostThreads / 128);
inline Meeting block;
inline std::vector<Known> known(kMostThreads);           // of each thread
inline std::array<uint32_t, kMostThreads / 32> meetings;  // of each warp
inline jmp_buf scheduler;
inline std::function<void()> kernel;
inline std::function<void(int)> before_block = [](int) {};  // what a test does meanwhile
inline int running = 0;

inline void yield() {
  if (_setjmp(fibers[running].place) == 0) _longjmp(scheduler, 1);
}

inline const uint64_t* meet(Meeting& meeting, int index, uint64_t value) {
  const uint64_t round = meeting.round;
  const int thread = running;
  Known& all_know = meeting.known[round % 2];
  meeting.brought[round % 2][index] = value;
  meeting.warps |= 1u << thread / 32;
  all_know.hear(known[thread]);
  if (++meeting.arrived == meeting.size) {
    for (uint32_t left = meeting.warps; left; left &= left - 1) {
      const int warp = std::countr_zero(left);
      all_know.of[warp] = ++meetings[warp];
    }
    meeting.warps = 0;
    meeting.arrived = 0;
    ++meeting.round;
  } else {
    while (meeting.round == round) yield();
  }
  known[thread] = all_know;
  return meeting.brought[round % 2];
}

inline int lane() { return threadIdx.x % 32; }

template <typename T>
uint64_t to_bits(T value) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <typename T>
T from_bits(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof(T));
  return value;
}

template <typename T>
const uint64_t* exchange(T value) {
  return meet(warps[threadIdx.x / 32], lane(), to_bits(value));
}

inline void enter() {
  kernel();
  fibers[running].done = true;
  _longjmp(scheduler, 1);
}

// Runs `body` in every thread of every block.
inline void launch(int blocks, int threads, int* shared, int64_t shared_bytes, int64_t shared_room,
                   std::function<void()> body) {
  if (shared_bytes > shared_room || threads > kMostThreads) abort();
  kernel = std::move(body);
  gridDim.x = blocks;
  blockDim.x = threads;
  for (int b = 0; b < blocks; ++b) {
    before_block(b);
    memset(shared, 0x5a, shared_room);
    for (Meeting& warp : warps) warp = {.size = 32};
    for (Meeting& warpgroup : warpgroups) warpgroup = {.size = 128};
    block = {.size = threads};
    std::fill(known.begin(), known.end(), Known{});
    meetings = {};
    for (int t = 0; t < threads; ++t) {
      if (!fibers[t].stack) fibers[t].stack.reset(new char[kStackBytes]);
      fibers[t].started = fibers[t].done = false;
    }
    for (int left = threads, rounds = 0; left > 0; ++rounds) {
      if (rounds > 100'000'000) abort();
      left = 0;
      for (int t = 0; t < threads; ++t) {
        if (fibers[t].done) continue;
        ++left;
        running = t;
        threadIdx.x = t;
        blockIdx.x = b;
        if (_setjmp(scheduler) != 0) continue;
        if (fibers[t].started) _longjmp(fibers[t].place, 1);
        fibers[t].started = true;
        getcontext(&fibers[t].context);
        fibers[t].context.uc_stack.ss_sp = fibers[t].stack.get();
        fibers[t].context.uc_stack.ss_size = kStackBytes;
        fibers[t].context.uc_link = nullptr;
        makecontext(&fibers[t].context, enter, 0);
        setcontext(&fibers[t].context);
      }
    }
    // Where the kernel says that it uses less than it does, it shows.
    for (int64_t i = shared_bytes; i < shared_room; ++i) {
      if (reinterpret_cast<unsigned char*>(shared)[i] != 0x5a) {
        fprintf(stderr, "shared memory written at byte %ld of %ld\n", static_cast<long>(i),
                static_cast<long>(shared_bytes));
        abort();
      }
    }
  }
}

}  // namespace host_cuda

inline void __syncthreads() { host_cuda::meet(host_cuda::block, threadIdx.x, 0); }
inline void __syncwarp() { host_cuda::exchange(0); }

inline int __syncthreads_or(int value) {
  const uint64_t* all = host_cuda::meet(host_cuda::block, threadIdx.x, value != 0);
  return std::any_of(all, all + blockDim.x, [](uint64_t v) { return v != 0; });
}

inline int __syncthreads_and(int value) {
  const uint64_t* all = host_cuda::meet(host_cuda::block, threadIdx.x, value != 0);
  return std::all_of(all, all + blockDim.x, [](uint64_t v) { return v != 0; });
}

template <typename T>
T __shfl_sync(uint32_t, T value, int from) {
  return host_cuda::from_bits<T>(host_cuda::exchange(value)[from & 31]);
}

template <typename T>
T __shfl_up_sync(uint32_t, T value, int distance) {
  const int from = host_cuda::lane() - distance;
  const uint64_t* all = host_cuda::exchange(value);
  return from < 0 ? value : host_cuda::from_bits<T>(all[from]);
}

template <typename T>
T __shfl_xor_sync(uint32_t, T value, int mask) {
  return host_cuda::from_bits<T>(host_cuda::exchange(value)[host_cuda::lane() ^ mask]);
}

inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }

inline uint32_t __ballot_sync(uint32_t, int predicate) {
  const uint64_t* all = host_cuda::exchange(predicate != 0);
  uint32_t bits = 0;
  for (int i = 0; i < 32; ++i) bits |= static_cast<uint32_t>(all[i] & 1) << i;
  return bits;
}

template <typename T>
uint32_t __match_any_sync(uint32_t, T value) {
  const uint64_t* all = host_cuda::exchange(value);
  uint32_t bits = 0;
  for (int i = 0; i < 32; ++i) bits |= static_cast<uint32_t>(all[i] == host_cuda::to_bits(value)) << i;
  return bits;
}

inline uint32_t __reduce_max_sync(uint32_t, uint32_t value) {
  const uint64_t* all = host_cuda::exchange(value);
  return static_cast<uint32_t>(*std::max_element(all, all + 32));
}

inline uint32_t __reduce_or_sync(uint32_t, uint32_t value) {
  const uint64_t* all = host_cuda::exchange(value);
  uint32_t bits = 0;
  for (int i = 0; i < 32; ++i) bits |= static_cast<uint32_t>(all[i]);
  return bits;
}

inline int __ffs(int bits) { return bits ? std::countr_zero(static_cast<uint32_t>(bits)) + 1 : 0; }
inline int __ffsll(long long bits) {
  return bits ? std::countr_zero(static_cast<uint64_t>(bits)) + 1 : 0;
}
inline float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t __float_as_uint(float value) { return std::bit_cast<uint32_t>(value); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }

template <typename T>
T atomicAdd(T* p, T value) {
  const T old = *p;
  *p += value;
  return old;
}

template <typename T>
T atomicExch(T* p, T value) {
  const T old = *p;
  *p = value;
  return old;
}
