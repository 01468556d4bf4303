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

// Tokens as TMA leaves them with 128-byte swizzle, rows of 64 bf16, eight of them to a pattern: the low
// half of their descriptor, which counts 16 bytes, and the high half, which is the same for all.
__device__ __forceinline__ uint32_t token_descriptor(uint32_t shared_address) {
  constexpr uint32_t kUnused = 1 << 16;
  return kUnused | (shared_address & 0x3FFFF) >> 4;
}
constexpr uint32_t kSwizzle128 = 1u << 30;
constexpr uint32_t kPatternStride = 1024 >> 4;

// The accumulators of wider tiles than this one stay what they are.
template <int N, int Size>
__device__ __forceinline__ void multiply_add(float (&acc)[Size], const uint32_t (&a)[4],
                                             uint32_t tokens) {
  static_assert(N / 2 <= Size);
  const uint64_t descriptor = static_cast<uint64_t>(kSwizzle128 | kPatternStride) << 32 | tokens;
  [&]<size_t... i>(std::index_sequence<i...>) {
    Atom<N>::Type::fma(a[0], a[1], a[2], a[3], descriptor, acc[i]...);
  }(std::make_index_sequence<N / 2>());
}

// Keeps the compiler from moving what touches the accumulators across this point.
template <int Size>
__device__ __forceinline__ void pin(float (&acc)[Size]) {
#pragma unroll
  for (int i = 0; i < Size; ++i) asm volatile("" : "+f"(acc[i])::"memory");
}

}  // namespace megamoe::sm90
