// E2M1 x UE4M3 to bf16: exact, since the product has at most 6 significant bits.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <cstdint>

namespace megamoe::comm {

// Two codes of one byte, the even element in the low half. The three magnitude bits of a code are
// an exponent and a mantissa bit of their own; placed at the same joint of a bf16 they are 2^-126
// times the value, subnormals included.
__device__ __forceinline__ __nv_bfloat162 widen_2(uint32_t byte) {
  const uint32_t bits = (byte & 0x07u) << 6 | (byte & 0x08u) << 12 | (byte & 0x70u) << 18 |
                        (byte & 0x80u) << 24;
  __nv_bfloat162 pair;
  memcpy(&pair, &bits, 4);
  return pair;
}

// Eight elements of one block: codes of k..k+7, low nibble first, and the block's scale.
__device__ __forceinline__ uint4 decode_8(uint32_t codes, uint32_t scale) {
  __nv_fp8_e4m3 e4m3;
  e4m3.__x = static_cast<__nv_fp8_storage_t>(scale);
  const __nv_bfloat162 block = __float2bfloat162_rn(static_cast<float>(e4m3));
  const __nv_bfloat162 unit = __float2bfloat162_rn(0x1p126f);
  uint32_t out[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __nv_bfloat162 pair = __hmul2(__hmul2(widen_2(codes >> 8 * i & 0xffu), unit), block);
    memcpy(&out[i], &pair, 4);
  }
  return {out[0], out[1], out[2], out[3]};
}

}  // namespace megamoe::comm
