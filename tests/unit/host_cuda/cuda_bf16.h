// bf16 on the host, as far as the kernels use it.
#pragma once

#include "host_cuda.h"

struct __nv_bfloat16 {
  uint16_t x;
};
struct __nv_bfloat162 {
  uint16_t x, y;
};

namespace host_cuda {

inline float widen(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }

inline uint16_t round_to_bf16(float value) {
  if (value != value) return 0x7fff;
  const uint32_t bits = __float_as_uint(value);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace host_cuda

inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {host_cuda::round_to_bf16(x), host_cuda::round_to_bf16(y)};
}
inline __nv_bfloat162 __float2bfloat162_rn(float value) {
  return __floats2bfloat162_rn(value, value);
}
inline __nv_bfloat162 __hmul2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return __floats2bfloat162_rn(host_cuda::widen(a.x) * host_cuda::widen(b.x),
                               host_cuda::widen(a.y) * host_cuda::widen(b.y));
}
inline __nv_bfloat162 __low2bfloat162(__nv_bfloat162 a) { return {a.x, a.x}; }
inline __nv_bfloat162 __high2bfloat162(__nv_bfloat162 a) { return {a.y, a.y}; }
