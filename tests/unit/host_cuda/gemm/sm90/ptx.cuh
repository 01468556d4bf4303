// csrc/gemm/sm90/ptx.cuh for the host. Copies are asynchronous: each arrives while somebody waits, in
// any order, and what it is going to overwrite is spoilt when it is asked for. And it is not enough that
// all goes well: who reads what a copy has brought must know that it is there, by barriers alone, and who
// asks for a copy that nobody reads any more what it overwrites.
#pragma once

#include <functional>
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
  host_cuda::meet(host_cuda::warpgroups[threadIdx.x / 128], threadIdx.x % 128, 0);
}
template <int registers>
void give_registers_back() {}
template <int registers>
void take_registers() {}

// Barriers.

struct Barrier {
  uint32_t arrivals;
  uint32_t missing;
  int number;         // by which Known counts its phases
  int64_t bytes = 0;  // expected and not there yet
  uint32_t phase = 0;
  host_cuda::Known arrived = {};  // what those knew who have arrived ...
  host_cuda::Known over = {};     // ... in phases that are over

  void look() {
    if (missing || bytes) return;
    missing = arrivals;
    over = arrived;
    over.of[number] = ++phase;
  }
};

struct Copy {
  uint32_t barrier;
  uint32_t to;
  std::vector<uint8_t> bytes;
};

inline std::map<uint32_t, Barrier> all_barriers;
inline std::vector<Copy> copies;                                          // on their way
inline std::vector<std::function<void()>> words[host_cuda::kMostThreads];  // to each thread, which has to wait
inline std::minstd_rand dice;

inline Barrier& barrier_at(uint32_t address) {
  const auto found = all_barriers.find(address);
  expect(found != all_barriers.end(), "no barrier here");
  return found->second;
}

inline void init_barrier(uint32_t address, uint32_t arrivals) {
  const int number = host_cuda::Known::kOthers + static_cast<int>(all_barriers.size());
  all_barriers[address] = {arrivals, arrivals, number};
}

// What has been done to 16 bytes of shared memory.
struct Granule {
  std::array<uint32_t, host_cuda::kMostThreads / 32> read;  // by each warp, before so many of its meetings
  int barrier;     // of the copy to them, 0 if there was none
  uint32_t phase;  // with which it is there
};
inline std::vector<Granule> granules(kSharedBytes / 16);
inline bool deaf = false;  // who waits for a barrier learns nothing, and what it cannot know is counted
inline int unknown = 0;

inline void expect_known(bool truth, const char* what) {
  if (!truth && deaf) {
    ++unknown;
  } else {
    expect(truth, what);
  }
}

inline host_cuda::Known& known() { return host_cuda::known[threadIdx.x]; }

inline Granule& granule_at(uint32_t address) {
  Granule& granule = granules[(address - kSharedBegin) / 16];
  expect_known(granule.barrier == 0 || known().of[granule.barrier] >= granule.phase,
               "cannot know that the last copy is there");
  return granule;
}

inline void note_read(uint32_t address) {
  const int warp = threadIdx.x / 32;
  granule_at(address).read[warp] = host_cuda::meetings[warp] + 1;
}

inline void note_copy(uint32_t to, uint32_t bytes, const Barrier& barrier) {
  for (uint32_t at = to; at < to + bytes; at += 16) {
    Granule& granule = granule_at(at);
    for (size_t warp = 0; warp < granule.read.size(); ++warp) {
      expect_known(granule.read[warp] <= known().of[warp], "cannot know that nobody reads this any more");
    }
    granule = {{}, barrier.number, barrier.phase + 1};
  }
}

// Before each block.
inline void forget() {
  expect(copies.empty(), "copies of the block before are still on their way");
  for (const auto& of_thread : words) expect(of_thread.empty(), "words have not been waited for");
  all_barriers.clear();
  std::fill(granules.begin(), granules.end(), Granule{});
}

inline void show_barriers() {}

inline std::minstd_rand pauses;

// Now and then others get far before the thread goes on.
inline void arrive(uint32_t address) {
  Barrier& barrier = barrier_at(address);
  expect(barrier.missing > 0, "an arrival too many");
  barrier.arrived.hear(known());
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
  if (!deaf) known().hear(barrier_at(address).over);
}

inline void wait_patiently(uint32_t address, uint32_t parity) { wait(address, parity); }

// Copies.

constexpr uint64_t kEvictFirst = 0;
constexpr uint64_t kEvictLast = 0;

inline void prefetch_map(const CUtensorMap*) {}

inline void send(uint32_t to, std::vector<uint8_t> bytes, uint32_t barrier) {
  note_copy(to, bytes.size(), barrier_at(barrier));
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
void copy_word(T* to, const T* from) {
  memset(to, 0xff, sizeof(T));
  words[threadIdx.x].push_back([=] { *to = *from; });
}
inline void wait_words() {
  for (const auto& bring : words[threadIdx.x]) bring();
  words[threadIdx.x].clear();
}

inline void sleep(uint32_t) {}

inline uint2 load_shared_8(uint32_t address) {
  note_read(address);
  uint2 v;
  memcpy(&v, shared_at(address, 8, 8), 8);
  return v;
}

inline uint4 load_shared_16(uint32_t address) {
  note_read(address);
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
