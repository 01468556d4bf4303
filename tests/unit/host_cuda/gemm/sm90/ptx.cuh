// csrc/gemm/sm90/ptx.cuh for the host. Copies are asynchronous: each arrives while somebody waits, in
// any order, and what it is going to overwrite is spoilt when it is asked for.
#pragma once

#include <map>
#include <random>

#include "dependent_launch.cuh"
#include "host_cuda.h"

struct CUtensorMap {  // of bf16 [rows, columns]
  const uint16_t* memory;
  int64_t rows;
  int64_t columns;
  int box_rows;
};

namespace megamoe::sm90 {

constexpr int kSharedBytes = 227 * 1024;
constexpr uint32_t kSharedBegin = 1024;  // its address, which a kernel must not take for 0
extern __attribute__((aligned(1024))) uint8_t shared_memory[];

inline void expect(bool truth, const char* what) {
  if (truth) return;
  fprintf(stderr, "block %u, thread %u: %s\n", blockIdx.x, threadIdx.x, what);
  abort();
}

inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(p) - shared_memory) + kSharedBegin;
}

inline uint8_t* shared_at(uint32_t address, uint32_t bytes, uint32_t alignment) {
  expect(address % alignment == 0, "a misaligned address in shared memory");
  expect(address >= kSharedBegin && address + bytes <= kSharedBegin + kSharedBytes,
         "an address outside of shared memory");
  return shared_memory + (address - kSharedBegin);
}

// Where the 128-byte swizzle puts the 16 bytes that belong at an address.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// Threads.

inline int thread_read_anew() { return threadIdx.x; }
inline uint32_t uniform(uint32_t x) {
  const uint32_t all = __reduce_or_sync(~0u, x);
  expect(all == x, "a number that differs within its warp");
  return all;
}
inline bool one_lane() { return threadIdx.x % 32 == 5; }
inline void sync_warpgroup() {
  static host_cuda::Meeting meetings[8];
  host_cuda::Meeting& meeting = meetings[threadIdx.x / 128];
  meeting.size = 128;
  host_cuda::meet(meeting, threadIdx.x % 128, 0);
}
template <int registers>
void give_registers_back() {}
template <int registers>
void take_registers() {}

// Barriers.

struct Barrier {
  uint32_t arrivals;
  uint32_t missing;
  int64_t bytes = 0;  // expected and not there yet
  uint32_t phase = 0;

  void look() {
    if (missing || bytes) return;
    missing = arrivals;
    ++phase;
  }
};

struct Copy {
  uint32_t barrier;
  uint32_t to;
  std::vector<uint8_t> bytes;
};

inline std::map<uint32_t, Barrier> all_barriers;
inline std::vector<Copy> copies;  // on their way
inline std::minstd_rand dice;

inline Barrier& barrier_at(uint32_t address) {
  const auto found = all_barriers.find(address);
  expect(found != all_barriers.end(), "no barrier here");
  return found->second;
}

inline void init_barrier(uint32_t address, uint32_t arrivals) {
  expect(copies.empty(), "copies of the block before are still on their way");
  all_barriers[address] = {arrivals, arrivals};
}

inline void show_barriers() {}

inline std::minstd_rand pauses;

// Now and then others get far before the thread goes on.
inline void arrive(uint32_t address) {
  Barrier& barrier = barrier_at(address);
  expect(barrier.missing > 0, "an arrival too many");
  --barrier.missing;
  barrier.look();
  for (int pause = pauses() % 64 == 0 ? 300 : 0; pause > 0; --pause) host_cuda::yield();
}

inline void arrive_and_expect(uint32_t address, uint32_t bytes) {
  barrier_at(address).bytes += bytes;
  arrive(address);
}

inline void deliver_one() {
  if (copies.empty()) return;
  std::swap(copies[dice() % copies.size()], copies.back());
  const Copy copy = std::move(copies.back());
  copies.pop_back();
  for (size_t i = 0; i < copy.bytes.size(); ++i) *shared_at(copy.to + i, 1, 1) = copy.bytes[i];
  Barrier& barrier = barrier_at(copy.barrier);
  barrier.bytes -= static_cast<int64_t>(copy.bytes.size());
  barrier.look();
}

inline int slow_warp = -1;  // one that looks only now and then, as if others ran in its place

inline void wait(uint32_t address, uint32_t parity) {
  const int between_looks = static_cast<int>(threadIdx.x / 32) == slow_warp ? 1500 : 1;
  for (int polls = 0; barrier_at(address).phase % 2 == parity; ++polls) {
    expect(polls < 1'000'000, "waits for ever");
    for (int i = 0; i < between_looks; ++i) {
      if (dice() % 4 == 0) deliver_one();
      host_cuda::yield();
    }
  }
}

inline void wait_patiently(uint32_t address, uint32_t parity) { wait(address, parity); }

// Copies.

constexpr uint64_t kEvictFirst = 0;
constexpr uint64_t kEvictLast = 0;

inline void prefetch_map(const CUtensorMap*) {}

inline void send(uint32_t to, std::vector<uint8_t> bytes, uint32_t barrier) {
  memset(shared_at(to, bytes.size(), 16), 0xff, bytes.size());
  copies.push_back({barrier, to, std::move(bytes)});
}

inline void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier, uint64_t) {
  expect(bytes % 16 == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0, "a misaligned copy");
  const auto* first = static_cast<const uint8_t*>(from);
  send(to, {first, first + bytes}, barrier);
}

inline void copy_box(uint32_t to, const CUtensorMap* map, int column, int row, uint32_t barrier,
                     uint64_t) {
  expect(waited[threadIdx.x], "tokens that the kernel ahead may be at work on");
  expect(to % 1024 == 0, "a box whose swizzle does not begin where it should");
  expect(column + 64 <= map->columns, "columns outside of the tokens");
  std::vector<uint8_t> bytes(128 * map->box_rows);
  for (int r = 0; r < map->box_rows && row + r < map->rows; ++r) {
    const uint16_t* from = map->memory + (row + r) * map->columns + column;
    for (int at = 0; at < 128; at += 16) memcpy(&bytes[swizzled(128 * r + at)], from + at / 2, 16);
  }
  send(to, std::move(bytes), barrier);
}

inline void store_8(int64_t address, uint2 v) {
  expect(address % 8 == 0, "a misaligned store");
  memcpy(reinterpret_cast<void*>(address), &v, 8);
}
inline int32_t load_from_l2(const int32_t* p) { return *p; }
template <typename T>
void copy_word(T* to, const T* from) { *to = *from; }
inline void wait_words() {}

inline void sleep(uint32_t) {}

inline uint2 load_shared_8(uint32_t address) {
  uint2 v;
  memcpy(&v, shared_at(address, 8, 8), 8);
  return v;
}

inline uint4 load_shared_16(uint32_t address) {
  uint4 v;
  memcpy(&v, shared_at(address, 16, 16), 16);
  return v;
}

// Arithmetic.

inline float power_of_2(float x) { return exp2f(x); }
inline float reciprocal(float x) { return 1.0f / x; }
inline float reciprocal_of_1_and_more(float x) { return 1.0f / x; }
inline float min_or_nan(float x, float y) { return x < y || std::isnan(x) ? x : y; }
inline float max_or_nan(float x, float y) { return x > y || std::isnan(x) ? x : y; }

}  // namespace megamoe::sm90
