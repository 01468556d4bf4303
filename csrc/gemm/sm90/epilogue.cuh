// From a warpgroup's accumulators, 128 weight rows x N tokens, to rows of bf16 in device memory.
//
// A thread holds, for m64 block mb, rows r and r + 8 (r = 16 * warp + lane / 4) at tokens
// 8j + 2 * (lane % 4) and the next. The two blocks have neighbours, and L2's rows r and r + 8 too: of a token
// a thread stores four outputs, and eight lanes have two whole sectors; for L1, where these are gate and up,
// it is two, and columns are by lane (megamoe_ep/prepack/sm90.py).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "gemm/sm90/decode.cuh"
#include "gemm/sm90/pipeline.cuh"

namespace megamoe::sm90 {

constexpr int kChunk = 16;  // tokens at a time
constexpr int kWarpgroup = 128;
constexpr int kWarps = kWarpgroup / 32;

struct Outputs {
  bool gated;                // L1: weight rows are gate and up, and SwiGLU makes one output of two
  __nv_bfloat16* out;        // [R, row_elements]
  int64_t row_elements;
  const int64_t* homes;      // L2: [R], the address that each row goes to instead, or null
  const float* row_scales;   // L1: [R]
  const float* alpha;        // L1: [L, 2]; L2: [L]
  const float* input_scale;  // L1: [L], or null
  float clamp;               // L1; infinity for none
};

// Shared memory of one warpgroup.
template <typename Cut>
struct alignas(16) Staging {
  union {                               // of the tile's rows
    float row_scales[Cut::kMaxTokens];  // L1
    int64_t rows[Cut::kMaxTokens];      // L2: addresses
  };
  float alpha[2];                       // L1: of gate and of up
  float input_scale;                    // L1
};

// Starts to fetch what store_outputs() needs beside the accumulators, which takes them a while.
template <typename Cut>
__device__ __forceinline__ void fetch_scales(Staging<Cut>& s, const Outputs& o, const Part& part) {
  const int thread = thread_read_anew() % kWarpgroup;
  const int rows = part.end_row - part.first_row;
  if (o.gated) {
    for (int t = thread; t < rows; t += kWarpgroup) {
      copy_word(&s.row_scales[t], o.row_scales + part.first_row + t);
    }
    if (thread < 2) copy_word(&s.alpha[thread], o.alpha + 2 * part.expert + thread);
    if (thread == 2 && o.input_scale != nullptr) {
      copy_word(&s.input_scale, o.input_scale + part.expert);
    }
  } else {
    for (int t = thread; t < rows; t += kWarpgroup) {
      const int64_t row = part.first_row + t;
      if (o.homes != nullptr) {
        copy_word(&s.rows[t], o.homes + row);
      } else {
        s.rows[t] = reinterpret_cast<int64_t>(o.out + row * o.row_elements);
      }
    }
    if (thread == 0) copy_word(&s.alpha[0], o.alpha + part.expert);
  }
}

__device__ __forceinline__ uint32_t pair_of(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, 4);
  return bits;
}

// silu(gate) * up. NaN in gives NaN out.
__device__ __forceinline__ float swiglu(float gate, float up) {
  return gate * reciprocal_of_1_and_more(1.0f + power_of_2(gate * -1.442695040888963f)) * up;
}

// Nearest E2M1 value of x, ties to the even code, saturating: adding a number whose last bit is worth one
// step rounds to that step, which is 1/2 up to 2, 1 up to 4 and 2 from there.
__device__ __forceinline__ float round_e2m1(float x) {
  const uint32_t power = max(__float_as_uint(x) & 0x7F800000u, __float_as_uint(1.0f));
  const float anchor = __uint_as_float(power + (__float_as_uint(0x1.8p22f) - __float_as_uint(1.0f)));
  return fminf(fmaxf((x + anchor) - anchor, -6.0f), 6.0f);
}

// How a block of 16 outputs is requantised. As megamoe_ep/nvfp4.py does, but for products with
// reciprocals; over_six is that of 6 * global_scale.
struct BlockScale {
  float scale;
  float inverse;  // of scale times global scale

  __device__ __forceinline__ BlockScale(float largest, float global_scale, float over_six) {
    const __nv_fp8_e4m3 rounded(fminf(fmaxf(largest * over_six, 0x1p-9f), 448.0f));
    scale = largest < __uint_as_float(0x7F800000u) ? static_cast<float>(rounded)
                                                   : __uint_as_float(0x7FC00000u);
    inverse = reciprocal(scale * global_scale);
  }

  __device__ __forceinline__ float operator()(float x) const {
    return round_e2m1(x * inverse) * scale;
  }
};

// A thread's tokens of a chunk, which it has an output of in each strip.
constexpr int kTokens = kChunk / 4;

// A block of 16 is the two outputs of each of eight lanes, which differ in bits 2 to 4. As they look for
// the largest of four tokens' blocks, each is left with one token, whose scales it then works out for all.
__device__ __forceinline__ void requantise(float (&h)[kTokens][2], float global_scale,
                                           float over_six) {
  const int lane = threadIdx.x % 32;
  float largest[kTokens];
#pragma unroll
  for (int t = 0; t < kTokens; ++t) largest[t] = max_or_nan(fabsf(h[t][0]), fabsf(h[t][1]));
  // Of two tokens' the one, as this lane and the one that differs in one bit both have seen it.
  const auto larger = [&](float without_bit, float with_bit, int bit) {
    const float keep = lane & bit ? with_bit : without_bit;
    return max_or_nan(keep, __shfl_xor_sync(~0u, lane & bit ? without_bit : with_bit, bit));
  };
  const float even = larger(largest[0], largest[2], 16), odd = larger(largest[1], largest[3], 16);
  const float mine = larger(even, odd, 8);
  const BlockScale of_mine(larger(mine, mine, 4), global_scale, over_six);
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    const int from = lane % 8 + 16 * (t / 2) + 8 * (t % 2);
    BlockScale block = of_mine;
    block.scale = __shfl_sync(~0u, of_mine.scale, from);
    block.inverse = __shfl_sync(~0u, of_mine.inverse, from);
    h[t][0] = block(h[t][0]);
    h[t][1] = block(h[t][1]);
  }
}

// Stores this warp's outputs of the part's first slab.
template <typename Cut, bool kGated>
__device__ __forceinline__ void store_outputs(float (&acc)[2][Cut::kMaxTokens / 2], const Outputs& o,
                                              Staging<Cut>& s, const Part& part) {
  constexpr int kSlabOutputs = kGated ? kSlabRows / 2 : kSlabRows;
  const int thread = thread_read_anew();
  const int warp = thread % kWarpgroup / 32;
  const int lane = thread % 32;
  const int first = part.first_row + 2 * (lane % 4);  // of this thread's rows; the others count from it
  const int end = part.end_row - first;
  const int first_column = part.slab * kSlabOutputs +
                           (kGated ? 8 * (lane / 4) + 2 * warp : 4 * (lane / 4) + 32 * warp);
  wait_words();
  sync_warpgroup();
  const float alpha[2] = {s.alpha[0] * kUnscale, kGated ? s.alpha[1] * kUnscale : 0.0f};
  __nv_bfloat16* out = o.out + first * o.row_elements + first_column;  // L1
  const bool clamped = kGated && o.clamp < __uint_as_float(0x7F800000u);
  const bool quantised = kGated && o.input_scale != nullptr;
  const float global_scale = quantised ? s.input_scale : 0.0f;
  const float over_six = reciprocal(6.0f * global_scale);

#pragma unroll
  for (int chunk = 0; chunk < Cut::kMaxTokens / kChunk; ++chunk) {
    if (part.first_row + chunk * kChunk >= part.end_row) break;
    // Of weight rows r, or r + 8, at this thread's token t of the chunk.
    const auto sum = [&](int t, int strip, int half) -> float& {
      return acc[strip][chunk * kChunk / 2 + 4 * (t / 2) + t % 2 + 2 * half];
    };
    if constexpr (kGated) {
      // All tokens' at a time, so that none waits for another's shuffles and quotients.
      const auto gate = [&](int t, int strip) -> float& { return sum(t, strip, 0); };
      const auto up = [&](int t, int strip) -> float& { return sum(t, strip, 1); };
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        const float row_scale = s.row_scales[chunk * kChunk + 8 * (t / 2) + 2 * (lane % 4) + t % 2];
#pragma unroll
        for (int strip = 0; strip < 2; ++strip) {
          gate(t, strip) *= row_scale * alpha[0];
          up(t, strip) *= row_scale * alpha[1];
        }
      }
      if (clamped) {
#pragma unroll
        for (int i = 0; i < 2 * kTokens; ++i) {
          float& of_up = up(i / 2, i % 2);
          gate(i / 2, i % 2) = min_or_nan(gate(i / 2, i % 2), o.clamp);
          of_up = max_or_nan(min_or_nan(of_up, o.clamp), -o.clamp);
        }
      }
      float h[kTokens][2];  // [token][strip]
#pragma unroll
      for (int i = 0; i < 2 * kTokens; ++i) {
        h[i / 2][i % 2] = swiglu(gate(i / 2, i % 2), up(i / 2, i % 2));
      }
      if (quantised) requantise(h, global_scale, over_six);
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        const int row = chunk * kChunk + 8 * (t / 2) + t % 2;
        if (row < end) {
          *reinterpret_cast<uint32_t*>(out + row * o.row_elements) = pair_of(h[t][0], h[t][1]);
        }
      }
    } else {
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        const int row = chunk * kChunk + 8 * (t / 2) + t % 2;
        if (row >= end) continue;
        const auto pair = [&](int half) {
          return pair_of(sum(t, 0, half) * alpha[0], sum(t, 1, half) * alpha[0]);
        };
        store_8(s.rows[row + 2 * (lane % 4)] + 2 * first_column, {pair(0), pair(1)});
      }
    }
  }
  sync_warpgroup();  // the next tile's scales are fetched into the same memory
}

}  // namespace megamoe::sm90
