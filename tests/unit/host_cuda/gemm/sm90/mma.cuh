// csrc/gemm/sm90/mma.cuh for the host: wgmma of one warp's 16 rows, done at once. Where it has its
// operands and sums is CuTe's layout, which tests/unit/host_sm90/fragments.cu holds the decoding to.
#pragma once

#include <cuda_bf16.h>

#include "gemm/sm90/ptx.cuh"

namespace megamoe::sm90 {

template <int N, int Size>
void multiply_add(float (&acc)[Size], const uint32_t (&a)[4], uint64_t tokens) {
  static_assert(N % 8 == 0 && N / 2 <= Size);
  expect(tokens >> 62 == 1 && (tokens >> 32 & 0x3fff) == 64, "tokens that are not swizzled by 128");
  const int lane = host_cuda::lane();
  float weights[2][16];  // rows r and r + 8 of this thread's sums
  for (int right = 0; right < 2; ++right) {
    const uint64_t* all = host_cuda::exchange(a[2 * right] | static_cast<uint64_t>(a[2 * right + 1]) << 32);
    for (int i = 0; i < 16; ++i) {
      const auto bits = static_cast<uint16_t>(all[lane / 4 * 4 + i / 2 % 4] >> (32 * (i / 8) + 16 * (i % 2)));
      weights[i / 8][8 * right + i % 8] = host_cuda::widen(bits);
    }
  }
  const uint32_t first = static_cast<uint32_t>(tokens & 0x3fff) << 4;
  for (int i = 0; i < N / 2; ++i) {
    const int token = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
    double sum = acc[i];
    for (int half = 0; half < 2; ++half) note_read(swizzled(first + 128 * token + 16 * half));
    for (int k = 0; k < 16; ++k) {
      uint16_t bits;
      memcpy(&bits, shared_at(swizzled(first + 128 * token + 2 * k), 2, 2), 2);
      sum += static_cast<double>(weights[i / 2 % 2][k]) * host_cuda::widen(bits);
    }
    acc[i] = static_cast<float>(sum);
  }
}

// A warp's threads all come to these.
inline void begin_products() { __syncwarp(); }
inline void wait_for_products() { __syncwarp(); }

template <int Size>
void pin(float (&)[Size]) {}

}  // namespace megamoe::sm90
