// E4M3 on the host, as far as the kernels use it: positive finite values, and NaN.
#pragma once

#include "host_cuda.h"

using __nv_fp8_storage_t = uint8_t;

struct __nv_fp8_e4m3 {
  __nv_fp8_storage_t __x = 0;

  __nv_fp8_e4m3() = default;
  explicit __nv_fp8_e4m3(float value) {
    if (value != value) {
      __x = 0x7f;
      return;
    }
    int exponent;
    frexpf(value, &exponent);
    exponent = std::max(exponent - 1, -6);
    const int steps = static_cast<int>(nearbyintf(ldexpf(value, 3 - exponent)));
    __x = static_cast<uint8_t>(std::min(steps + (exponent + 6) * 8, 0x7e));
  }
  explicit operator float() const {
    if (__x == 0x7f) return NAN;
    const int exponent = __x >> 3;
    return ldexpf((__x & 7) + (exponent ? 8 : 0), std::max(exponent, 1) - 10);
  }
};
