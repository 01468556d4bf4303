// NVFP4 weights, as megamoe_ep/prepack/sm90.py lays them out, to fragments of wgmma's A operand.
//
// A word holds the eight codes that one thread needs for one k16 step of 64 rows: registers a0..a3
// of the fragment, each a pair of neighbouring k. Put at the joint of a bf16's exponent and mantissa,
// a code's three magnitude bits are the value times 2^-126, subnormals included. Scales are bf16 of
// 5 exponent bits, worth 2^119 times the block scale; the product is exact, and 2^-7 of the weight.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace megamoe::sm90 {

constexpr float kUnscale = 128.0f;  // what the products lack

constexpr uint32_t kCodes = 0x81C081C0;  // where a code belongs in each half of a register

MEGAMOE_HD uint32_t rotate_left(uint32_t word, int by) { return word << by | word >> (32 - by); }

// A word as a1 and a3 want it, rotated once for both: the compiler would shift it anew for a1, which has
// no use for the bits that come around.
MEGAMOE_HD uint32_t rotated(uint32_t word) {
  word = rotate_left(word, 3);
#ifdef __CUDA_ARCH__
  asm("" : "+r"(word));
#endif
  return word;
}

// Register i of the fragment, before its scale. Three times four bits of a half-word can have a code's
// own distances; a3 is what they leave, brought together by one product that shifts by 2, 7 and 12
// without a carry.
template <int i>
MEGAMOE_HD uint32_t codes_of(uint32_t word, uint32_t rotated) {
  static_assert(i >= 0 && i < 4);
  if constexpr (i == 0) return word & kCodes;
  if constexpr (i == 1) return rotated & kCodes;
  if constexpr (i == 2) return rotate_left(word, 29) & kCodes;
  return (rotated & 0x001B001B) * (1 << 2 | 1 << 7 | 1 << 12) & kCodes;
}

// Scales of rows r (low half) and r + 8 (high half) of a strip: one word has those of both strips.
template <int strip>
MEGAMOE_HD uint32_t scales_of(uint32_t word) {
#ifdef __CUDA_ARCH__
  const uint32_t turned = strip ? __byte_perm(word, word, 0x0321) : word;
#else
  const uint32_t turned = strip ? word >> 8 | word << 24 : word;
#endif
#ifdef __CUDA_ARCH__
  // One instruction, as long as the compiler does not know the constants.
  uint32_t mask = 0x0FF00FF0u, exponent = 0x70007000u, pair;
  asm("" : "+r"(mask), "+r"(exponent));
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(pair) : "r"(turned), "r"(mask), "r"(exponent));
  return pair;
#else
  return (turned & 0x0FF00FF0u) | 0x70007000u;
#endif
}

}  // namespace megamoe::sm90
