// wgmma with weights from registers and tokens from shared memory, for every tile width.
#pragma once

#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED
#include <cute/arch/mma_sm90_gmma.hpp>

#include <cstdint>
#include <utility>

namespace megamoe::sm90 {

namespace gmma = cute::SM90::GMMA;

// The atom of 64 weight rows, N tokens and 16 of k.
template <int N>
struct Atom;
#define MEGAMOE_ATOM(N)                                                                            \
  template <>                                                                                      \
  struct Atom<N> {                                                                                 \
    using Type = gmma::MMA_64x##N##x16_F32BF16BF16_RS<gmma::Major::K, gmma::Major::K>;             \
  };
MEGAMOE_ATOM(8)
MEGAMOE_ATOM(16)
MEGAMOE_ATOM(24)
MEGAMOE_ATOM(32)
MEGAMOE_ATOM(40)
MEGAMOE_ATOM(48)
MEGAMOE_ATOM(56)
MEGAMOE_ATOM(64)
MEGAMOE_ATOM(72)
MEGAMOE_ATOM(80)
MEGAMOE_ATOM(88)
MEGAMOE_ATOM(96)
MEGAMOE_ATOM(104)
MEGAMOE_ATOM(112)
MEGAMOE_ATOM(120)
MEGAMOE_ATOM(128)
MEGAMOE_ATOM(136)
MEGAMOE_ATOM(144)
MEGAMOE_ATOM(152)
MEGAMOE_ATOM(160)
MEGAMOE_ATOM(168)
MEGAMOE_ATOM(176)
#undef MEGAMOE_ATOM

// Adds weights x tokens, these by their descriptor in shared memory. The accumulators of wider tiles than
// this one stay what they are.
template <int N, int Size>
__device__ __forceinline__ void multiply_add(float (&acc)[Size], const uint32_t (&a)[4],
                                             uint64_t tokens) {
  static_assert(N / 2 <= Size);
  [&]<size_t... i>(std::index_sequence<i...>) {
    Atom<N>::Type::fma(a[0], a[1], a[2], a[3], tokens, acc[i]...);
  }(std::make_index_sequence<N / 2>());
}

// Before the products of a group, when their operands in registers are what they are to be; after them.
__device__ __forceinline__ void begin_products() { cute::warpgroup_arrive(); }
__device__ __forceinline__ void wait_for_products() {
  cute::warpgroup_commit_batch();
  cute::warpgroup_wait<0>();
}

// Keeps the compiler from moving what touches the accumulators across this point.
template <int Size>
__device__ __forceinline__ void pin(float (&acc)[Size]) {
#pragma unroll
  for (int i = 0; i < Size; ++i) asm volatile("" : "+f"(acc[i])::"memory");
}

}  // namespace megamoe::sm90
