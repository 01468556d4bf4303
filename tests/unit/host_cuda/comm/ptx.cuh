// csrc/comm/ptx.cuh for the host: one thread runs at a time, so every access is ordered.
#pragma once

#include "dependent_launch.cuh"
#include "host_cuda.h"

namespace megamoe::comm {

template <typename T>
T load_any(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T)) abort();  // a GPU would trap
  T value;
  memcpy(&value, p, sizeof(T));
  return value;
}

template <typename T>
void store_any(void* p, T value) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T)) abort();
  memcpy(p, &value, sizeof(T));
}

inline uint4 load_16(const void* p) { return load_any<uint4>(p); }
inline uint32_t load_4(const void* p) { return load_any<uint32_t>(p); }
inline uint32_t load_1(const void* p) { return load_any<uint8_t>(p); }
inline void store_16(void* p, uint4 v) { store_any(p, v); }
inline void store_16_passing(void* p, uint4 v) { store_any(p, v); }
inline void store_8(void* p, uint2 v) { store_any(p, v); }
inline void store_4(void* p, uint32_t v) { store_any(p, v); }
inline void store_1(void* p, uint32_t v) { store_any(p, static_cast<uint8_t>(v)); }

inline uint64_t load_acquire_sys(const uint64_t* p) { return *p; }
inline uint64_t load_relaxed_sys(const uint64_t* p) { return *p; }
inline uint32_t load_relaxed_gpu(const void* p) { return load_any<uint32_t>(p); }
inline void store_relaxed_sys(uint64_t* p, uint64_t v) { *p = v; }
inline void store_release_sys(uint64_t* p, uint64_t v) { *p = v; }
inline void add_release_sys(uint64_t* p, uint64_t v) { *p += v; }
inline void fence_sys() {}
inline uint32_t add_acquire_gpu(uint32_t* p, uint32_t v) { return atomicAdd(p, v); }

inline uint32_t larger_magnitudes(uint32_t a, uint32_t b) {
  const auto half = [](uint32_t x, uint32_t y) {
    const uint32_t larger = std::max(x & 0x7fffu, y & 0x7fffu);
    return larger > 0x7f80 ? 0x7fffu : larger;  // the one NaN that instructions give
  };
  return half(a, b) | half(a >> 16, b >> 16) << 16;
}

// A clock that runs by being looked at: deadlines pass.
inline uint64_t host_clock_ns = 0;
inline uint64_t globaltimer_ns() { return host_clock_ns += 1000; }

}  // namespace megamoe::comm
