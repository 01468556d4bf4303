// NVFP4 as megamoe_ep/nvfp4.py defines it, one value or one block of 16 at a time. Host and device
// give the same bits: fp32, every operation rounded to nearest, divisions true ones.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace megamoe {

constexpr int kBlock = 16;
constexpr uint8_t kNanUe4m3 = 0x7f;

// One block: a scale, and 16 codes with the first in the lowest bits.
struct QuantisedBlock {
  uint64_t codes;
  uint8_t scale;
};

MEGAMOE_HD float from_bf16(uint32_t bits) {
  const uint32_t wide = bits << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}

MEGAMOE_HD float decode_ue4m3(uint8_t bits) {
  __nv_fp8_e4m3 value;
  value.__x = bits;
  return static_cast<float>(value);
}

// Nearest UE4M3 of a number from 0 to 448, ties to even.
MEGAMOE_HD uint8_t encode_ue4m3(float x) { return __nv_fp8_e4m3(x).__x; }

// Nearest E2M1 code, ties to even, saturating; NaN gives 0.
MEGAMOE_HD uint32_t encode_e2m1(float x) {
  const float m = fabsf(x);
  const uint32_t code = (m > 0.25f) + (m >= 0.75f) + (m > 1.25f) + (m >= 1.75f) + (m > 2.5f) +
                        (m >= 3.5f) + (m > 5.0f);
  return code | (x == x && signbit(x) ? 8u : 0u);
}

MEGAMOE_HD float decode_e2m1(uint32_t code) {
  const int exponent = static_cast<int>(code >> 1 & 3);
  const int significand = static_cast<int>(code & 1) + (exponent > 0 ? 2 : 0);
  const int halves = significand << (exponent > 0 ? exponent - 1 : 0);
  const float magnitude = 0.5f * static_cast<float>(halves);
  return code & 8 ? -magnitude : magnitude;
}

MEGAMOE_HD uint32_t code_of(const QuantisedBlock& block, int i) {
  return static_cast<uint32_t>(block.codes >> 4 * i) & 15u;
}

// Largest magnitude of a block; NaN where it holds one.
MEGAMOE_HD float largest_magnitude(const float (&x)[kBlock]) {
  float largest = 0;
#pragma unroll
  for (int i = 0; i < kBlock; ++i) {
    const float m = fabsf(x[i]);
    largest = m > largest || m != m ? m : largest;
    if (m != m) return m;
  }
  return largest;
}

// Quantises with a global scale.
MEGAMOE_HD QuantisedBlock quantise(const float (&x)[kBlock], float global_scale) {
  const float largest = largest_magnitude(x);
  const float quotient = largest / (6.0f * global_scale);
  if (!(largest < INFINITY) || quotient != quotient) return {0, kNanUe4m3};
  QuantisedBlock block = {0, encode_ue4m3(fminf(fmaxf(quotient, 0x1p-9f), 448.0f))};
  const float step = decode_ue4m3(block.scale) * global_scale;
#pragma unroll
  for (int i = 0; i < kBlock; ++i) {
    block.codes |= static_cast<uint64_t>(encode_e2m1(x[i] / step)) << 4 * i;
  }
  return block;
}

// Codes and scale of a block that is exactly code x scale, as bf16 rows of the layer are: a pair
// that gives back every value. It need not be the pair that the block was made from.
//
// The largest magnitude is the scale times one of the seven magnitudes of E2M1 other than 0, so one
// of seven scales is the block's own; each is tried, the likeliest first, and the first with which
// all values come out exactly is taken. A block with NaN gets a scale of NaN; so does one that no
// scale fits, which is not of this form.
MEGAMOE_HD QuantisedBlock recover(const float (&x)[kBlock]) {
  const float largest = largest_magnitude(x);
  if (!(largest <= 6.0f * 448.0f)) return {0, kNanUe4m3};
  for (uint32_t code = 7; code > 0; --code) {
    QuantisedBlock block = {0, encode_ue4m3(fminf(largest / decode_e2m1(code), 448.0f))};
    const float scale = decode_ue4m3(block.scale);
    if (largest > 0 && scale == 0) continue;
    bool exact = true;
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      const uint32_t q = encode_e2m1(largest > 0 ? x[i] / scale : x[i]);
      exact = exact && decode_e2m1(q) * scale == x[i];
      block.codes |= static_cast<uint64_t>(q) << 4 * i;
    }
    if (exact) return block;
  }
  return {0, kNanUe4m3};
}

}  // namespace megamoe
