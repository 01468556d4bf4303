// From a warpgroup's accumulators, 128 weight rows x N tokens, to rows of bf16 in device memory.
//
// A thread holds, for m64 block mb, rows r and r + 8 (r = 16 * warp + lane / 4) at tokens
// 8j + 2 * (lane % 4) and the next. Sixteen tokens at a time are transposed through shared memory and
// leave as one bulk copy a token: 256 bytes for L2; for L1, whose rows r and r + 8 are gate and up of
// one output, 128.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cutlass/arch/barrier.h>

#include <cstdint>

#include "gemm/sm90/decode.cuh"
#include "gemm/sm90/pipeline.cuh"

namespace megamoe::sm90 {

constexpr int kChunk = 16;                            // tokens transposed at a time
constexpr int kStagedRow = 2 * kSlabRows + 16;        // bytes; the 16 keep banks apart
constexpr int kStagingBytes = 2 * kChunk * kStagedRow;  // of a warpgroup: two chunks in turn
constexpr int kWarpgroup = 128;

struct Outputs {
  __nv_bfloat16* out;        // [R, row_elements]
  int64_t row_elements;
  const float* alpha;        // L1: [L, 2]; L2: [L]
  const float* input_scale;  // L1: [L], or null
  float clamp;               // L1; infinity for none
};

struct Staging {
  uint32_t memory;      // shared address, kStagingBytes of this warpgroup
  const float* scales;  // shared: global scale of each of the tile's rows (L1)
  int barrier;          // named barrier of this warpgroup
};

__device__ __forceinline__ void meet(const Staging& s) {
  cutlass::arch::NamedBarrier::sync(kWarpgroup, s.barrier);
}

// This thread's number in the block, read anew: what is worked out from it is not kept in registers
// while the accumulators need them.
__device__ __forceinline__ int thread_read_anew() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

__device__ __forceinline__ uint32_t pair_of(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, 4);
  return bits;
}

// Four 8x8 matrices of bf16, each transposed: lanes 8m to 8m + 7 say where matrix m's rows go.
__device__ __forceinline__ void store_transposed(uint32_t address, const uint32_t (&m)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   address),
               "r"(m[0]), "r"(m[1]), "r"(m[2]), "r"(m[3])
               : "memory");
}

// silu(gate) * up. NaN in gives NaN out, as clamps by comparison let it through.
__device__ __forceinline__ float swiglu(float gate, float up, float clamp) {
  gate = gate > clamp ? clamp : gate;
  up = up > clamp ? clamp : up < -clamp ? -clamp : up;
  float exponential, inverse;
  asm("ex2.approx.f32 %0, %1;" : "=f"(exponential) : "f"(gate * -1.442695040888963f));
  asm("rcp.approx.f32 %0, %1;" : "=f"(inverse) : "f"(1.0f + exponential));
  return gate * inverse * up;
}

// Nearest E2M1 value of x, ties to the even code, saturating: adding a number whose last bit is worth
// one step rounds to that step.
__device__ __forceinline__ float round_e2m1(float x) {
  constexpr float kHalfSteps = 0x1.8p22f;
  const float m = fabsf(x);
  const float anchor = m < 2.0f ? kHalfSteps : m < 4.0f ? 2.0f * kHalfSteps : 4.0f * kHalfSteps;
  return copysignf(fminf((m + anchor) - anchor, 6.0f), x);
}

// Bits of the largest magnitude over the lanes that differ in bits 2 to 4; NaN is above infinity.
__device__ __forceinline__ uint32_t largest_of_lanes(uint32_t largest) {
#pragma unroll
  for (int lanes = 4; lanes < 32; lanes *= 2) {
    largest = max(largest, __shfl_xor_sync(~0u, largest, lanes));
  }
  return largest;
}

// How a block of 16 outputs is requantised. As megamoe_ep/nvfp4.py does, but for the product with a
// reciprocal.
struct BlockScale {
  float scale;
  float inverse;  // of scale times global scale

  __device__ __forceinline__ BlockScale(uint32_t largest, float global_scale) {
    const float quotient = __fdividef(__uint_as_float(largest), 6.0f * global_scale);
    const __nv_fp8_e4m3 rounded(fminf(fmaxf(quotient, 0x1p-9f), 448.0f));
    scale = largest < 0x7F800000u ? static_cast<float>(rounded) : __uint_as_float(0x7FC00000u);
    asm("rcp.approx.f32 %0, %1;" : "=f"(inverse) : "f"(scale * global_scale));
  }

  __device__ __forceinline__ float operator()(float x) const {
    return round_e2m1(x * inverse) * scale;
  }
};

// Stores this warpgroup's outputs of slab `slab` for tokens first_row to end_row, at most kWidest.
template <int kWidest, bool kGated>
__device__ __forceinline__ void store_outputs(float (&acc)[2][kWidest / 2], const Outputs& o,
                                              const Staging& s, int expert, int slab,
                                              int first_row, int end_row) {
  constexpr int kStrips = 2;
  constexpr int kMatrices = kChunk / 8;  // along the tokens
  constexpr int kRowBytes = kGated ? kSlabRows : 2 * kSlabRows;
  const int thread = thread_read_anew() % kWarpgroup;
  const int warp = thread / 32;
  const int lane = thread % 32;
  const bool stores = thread < kChunk;  // one thread a token

  float alpha[2], global_scale = 0;
  alpha[0] = (kGated ? o.alpha[2 * expert] : o.alpha[expert]) * kUnscale;
  alpha[1] = kGated ? o.alpha[2 * expert + 1] * kUnscale : alpha[0];
  const bool quantised = kGated && o.input_scale != nullptr;
  if (quantised) global_scale = o.input_scale[expert];

#pragma unroll
  for (int chunk = 0; chunk < kWidest / kChunk; ++chunk) {
    if (first_row + chunk * kChunk >= end_row) break;
    const uint32_t staged = s.memory + (chunk % 2) * kChunk * kStagedRow;
    // Earlier copies have to be through with this half; a tile may begin where the last one ended.
    if (stores) {
      if (chunk == 0) {
        wait_stores_read<0>();
      } else {
        wait_stores_read<1>();
      }
    }
    meet(s);

    uint32_t pairs[kStrips][kMatrices][kGated ? 1 : 2];  // [strip][8 tokens][rows r, r + 8]
    if constexpr (kGated) {
#pragma unroll
      for (int j = 0; j < kMatrices; ++j) {
        const int column = chunk * kChunk + 8 * j;
        float h[2][kStrips];  // [token][strip]
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          const float row_scale = s.scales[column + 2 * (lane % 4) + t];
#pragma unroll
          for (int strip = 0; strip < kStrips; ++strip) {
            const float gate = acc[strip][column / 2 + t] * row_scale * alpha[0];
            const float up = acc[strip][column / 2 + 2 + t] * row_scale * alpha[1];
            h[t][strip] = swiglu(gate, up, o.clamp);
          }
          if (quantised) {
            // A block of 16 is the eight outputs of a warp in one strip, then those in the other.
            const uint32_t largest = largest_of_lanes(
                max(__float_as_uint(fabsf(h[t][0])), __float_as_uint(fabsf(h[t][1]))));
            const BlockScale requantised(largest, global_scale);
            h[t][0] = requantised(h[t][0]);
            h[t][1] = requantised(h[t][1]);
          }
        }
#pragma unroll
        for (int strip = 0; strip < kStrips; ++strip) {
          pairs[strip][j][0] = pair_of(h[0][strip], h[1][strip]);
        }
      }
    } else {
#pragma unroll
      for (int j = 0; j < kMatrices; ++j) {
#pragma unroll
        for (int strip = 0; strip < kStrips; ++strip) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float* two = &acc[strip][(chunk * kChunk + 8 * j) / 2 + 2 * half];
            pairs[strip][j][half] = pair_of(two[0] * alpha[0], two[1] * alpha[0]);
          }
        }
      }
    }

    // Where a lane's matrix row goes: token lane % 8 of eight, and 16 bytes of outputs.
    const int matrix = lane / 8;
    if constexpr (kGated) {
      // 16 outputs a warp: eight of strip 0, eight of strip 1.
      const int strip = matrix % 2;
      const int j = matrix / 2;
      const uint32_t to = staged + (8 * j + lane % 8) * kStagedRow + 32 * warp + 16 * strip;
      store_transposed(to,
                       {pairs[0][0][0], pairs[1][0][0], pairs[0][1][0], pairs[1][1][0]});
    } else {
#pragma unroll
      for (int j = 0; j < kMatrices; ++j) {
        const int strip = matrix / 2;
        const int half = matrix % 2;
        const uint32_t to =
            staged + (8 * j + lane % 8) * kStagedRow + 128 * strip + 32 * warp + 16 * half;
        store_transposed(to, {pairs[0][j][0], pairs[0][j][1], pairs[1][j][0], pairs[1][j][1]});
      }
    }
    cutlass::arch::fence_view_async_shared();
    meet(s);
    if (stores) {
      const int token = chunk * kChunk + thread;
      if (first_row + token < end_row) {
        char* to = reinterpret_cast<char*>(o.out + (first_row + token) * o.row_elements) +
                   static_cast<int64_t>(slab) * kRowBytes;
        store_bulk(to, staged + thread * kStagedRow, kRowBytes);
      }
      commit_stores();
    }
  }
}

}  // namespace megamoe::sm90
