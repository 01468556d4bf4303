// Stage: this rank's tokens into its symmetric inputs, quantised to NVFP4 on the way, in one pass
// over x. The same bits as megamoe_ep/nvfp4.py: fp32, every operation rounded to nearest, divisions
// true ones.
//
// Floor: bytes of x read plus bytes written, over memory bandwidth.
#pragma once

#include <cuda_fp8.h>

#include "comm/call.cuh"

namespace megamoe::comm {

constexpr uint32_t kInfinityBf16 = 0x7f80;  // bits of a magnitude; what is at or above is not finite
constexpr uint32_t kNanUe4m3 = 0x7f;
constexpr uint32_t kNanFp32 = 0x7fc00000;

// One product of 32 bits, where those of a row's bytes in 64 take four.
template <typename Bytes>
__device__ __forceinline__ Bytes* row_at(Bytes* rows, int row, int row_bytes) {
  return rows + static_cast<int64_t>(row) * row_bytes;
}

struct Block16 {
  uint4 halves[2];  // 16 consecutive bf16
};

__device__ __forceinline__ Block16 load_block(const char* row, int block) {
  return {{load_16(row + block * 32), load_16(row + block * 32 + 16)}};
}

// Bits of the largest magnitude: ordered as the values are, NaN above infinity.
__device__ __forceinline__ uint32_t largest_magnitude(const Block16& x) {
  const auto of_half = [](uint4 half) {
    return larger_magnitudes(larger_magnitudes(half.x, half.y), larger_magnitudes(half.z, half.w));
  };
  const uint32_t both = larger_magnitudes(of_half(x.halves[0]), of_half(x.halves[1]));
  return max(both & 0x7fffu, both >> 16 & 0x7fffu);
}

__device__ __forceinline__ float from_bf16(uint32_t bits) { return __uint_as_float(bits << 16); }

// Nearest E2M1 code of a finite or infinite value, ties to even, saturating; NaN gives 0.
__device__ __forceinline__ uint32_t encode_e2m1(float x) {
  const float m = fabsf(x);
  const uint32_t code = (m > 0.25f) + (m >= 0.75f) + (m > 1.25f) + (m >= 1.75f) + (m > 2.5f) +
                        (m >= 3.5f) + (m > 5.0f);
  return code | (x == x ? __float_as_uint(x) >> 28 & 8u : 0u);
}

// x / y rounded to nearest, as two corrections of the product with 1 / y make it (Markstein), where
// nothing overflows or underflows; 1 / y is the rounded one.
__device__ __forceinline__ float divide(float x, float y, float one_over_y) {
  float quotient = __fmul_rn(x, one_over_y);
  quotient = __fmaf_rn(__fmaf_rn(-quotient, y, x), one_over_y, quotient);
  return __fmaf_rn(__fmaf_rn(-quotient, y, x), one_over_y, quotient);
}

// Of E2M1's codes 1 to 7, the smallest magnitude in bf16 that gets it or one above, once in each half.
struct Boundaries {
  uint32_t of[7];
};

// A magnitude gets a code if its quotient by `step`, rounded, lies above the middle below the code's value,
// or for every other one at it. The magnitude is near the middle times `step`: the next bf16 above it, unless
// the one below is so near that rounding decides.
__device__ __forceinline__ Boundaries boundaries(float step, float one_over_step) {
  constexpr float kMiddles[7] = {0.25f, 0.75f, 1.25f, 1.75f, 2.5f, 3.5f, 5.0f};
  Boundaries found;
  uint32_t least_above = ~0u;  // fp32 steps from the bf16 below
#pragma unroll
  for (int i = 0; i < 7; ++i) {
    const uint32_t bits = __float_as_uint(__fmul_rn(step, kMiddles[i]));
    least_above = min(least_above, bits & 0xffffu);
    found.of[i] = (bits >> 16) + 1;
  }
  if (least_above <= 2) {
#pragma unroll
    for (int i = 0; i < 7; ++i) {
      const float quotient = divide(from_bf16(found.of[i] - 1), step, one_over_step);
      found.of[i] -= i % 2 ? quotient >= kMiddles[i] : quotient > kMiddles[i];
    }
  }
#pragma unroll
  for (uint32_t& both : found.of) both *= 0x10001u;
  return found;
}

// `mask`'s bits of a, the others of b.
__device__ __forceinline__ uint32_t select(uint32_t mask, uint32_t a, uint32_t b) {
  return (a & mask) | (b & ~mask);
}

// Codes of 8 finite values, two at a time.
__device__ __forceinline__ uint32_t encode_8(uint4 x, const Boundaries& boundaries) {
  const uint32_t words[4] = {x.x, x.y, x.z, x.w};
  uint32_t code[4];  // in the upper four bits of each half
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t at[7];  // the uppermost bit of each half: whether it is at the boundary or above
#pragma unroll
    for (int b = 0; b < 7; ++b) at[b] = (words[i] | 0x80008000u) - boundaries.of[b];
    const uint32_t bit_0 = at[0] ^ at[1] ^ at[2] ^ at[3] ^ at[4] ^ at[5] ^ at[6];
    const uint32_t bit_1 = (at[1] & ~at[3]) | at[5];
    code[i] = select(0x80008000u, words[i], at[3] >> 1);
    code[i] = select(0xc000c000u, code[i], bit_1 >> 2);
    code[i] = select(0xe000e000u, code[i], bit_0 >> 3);
  }
  // The first of each two in the lower half of its byte.
  const uint32_t first = (code[0] >> 8 & 0xffu) | (code[1] & 0xff00u) |
                         (code[2] << 8 & 0xff0000u) | (code[3] << 16 & 0xff000000u);
  const uint32_t second = code[0] >> 24 | (code[1] >> 16 & 0xff00u) | (code[2] >> 8 & 0xff0000u) |
                          (code[3] & 0xff000000u);
  return select(0xf0f0f0f0u, second, first >> 4);
}

// The same, by quotients of any size.
__device__ __forceinline__ uint32_t encode_8(uint4 x, float step) {
  const uint32_t words[4] = {x.x, x.y, x.z, x.w};
  uint32_t codes = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint32_t bf16 = i % 2 ? words[i / 2] >> 16 : words[i / 2] & 0xffffu;
    codes |= encode_e2m1(__fdiv_rn(from_bf16(bf16), step)) << 4 * i;
  }
  return codes;
}

__device__ __noinline__ uint2 encode_extraordinary(const Block16& x, float step) {
  return {encode_8(x.halves[0], step), encode_8(x.halves[1], step)};
}

// Quantises a block with this largest magnitude, by global scale g: its scale, and its codes in `codes`.
__device__ __forceinline__ uint32_t quantise_block(const Block16& x, uint32_t largest, float g,
                                                   uint2& codes) {
  codes = {0, 0};
  const float quotient = __fdiv_rn(from_bf16(largest), __fmul_rn(6.0f, g));
  if (largest >= kInfinityBf16 || quotient != quotient) return kNanUe4m3;
  __nv_fp8_e4m3 scale(fminf(fmaxf(quotient, 0x1p-9f), 448.0f));
  const float step = __fmul_rn(static_cast<float>(scale), g);
  const float one_over_step = __fdiv_rn(1.0f, step);
  // Far from the ends of fp32's range: but for a global scale that somebody set, always.
  if (step > 0x1p-100f && step < 0x1p100f && quotient < 0x1p20f) {
    const Boundaries of_step = boundaries(step, one_over_step);
    codes = {encode_8(x.halves[0], of_step), encode_8(x.halves[1], of_step)};
  } else {
    codes = encode_extraordinary(x, step);
  }
  return scale.__x;
}

struct StageArguments {
  const char* x;               // bf16 [rows, H]
  const int32_t* topk_idx;     // [rows, K]
  const float* topk_weights;   // [rows, K]
  const float* global_scale;   // static, fp32 [1], or null: each token its own
  const int32_t* num_tokens;   // on the device, int32 [1], or null: `rows` of them
  int32_t rows;
};

MEGAMOE_HD int64_t stage_shared_bytes() { return 4 * 2 * kWarps; }

// Quantises row t, of which this thread holds its first block. Block-wide, with one barrier, so that
// calls in turn need a largest_of_warp each.
__device__ __forceinline__ void quantise_token(const View& v, const StageArguments& a, int t,
                                               Block16 block, uint32_t* largest_of_warp) {
  const int lane = threadIdx.x % 32;
  const int blocks = static_cast<int>(v.hidden_size / 16);
  const char* from = row_at(a.x, t, 32 * blocks);
  uint32_t largest_of_block = largest_magnitude(block);
  uint32_t largest = largest_of_block;
#pragma unroll 1
  for (int b = threadIdx.x + kThreads; b < blocks; b += kThreads) {
    largest = max(largest, largest_magnitude(load_block(from, b)));
  }
  largest = __reduce_max_sync(~0u, largest);
  if (lane == 0) largest_of_warp[threadIdx.x / 32] = largest;
  __syncthreads();
  largest = __reduce_max_sync(~0u, largest_of_warp[lane % kWarps]);

  float g = __uint_as_float(kNanFp32);
  if (largest < kInfinityBf16) {
    g = a.global_scale ? *a.global_scale
                       : fmaxf(__fdiv_rn(from_bf16(largest), 2688.0f), 0x1p-117f);
  }
  char* codes_to = row_at(v.mine<char>(v.x), t, 8 * blocks);
  char* scales_to = row_at(v.mine<char>(v.x_sf), t, blocks);
  if (threadIdx.x == 0) v.mine<float>(v.x_scales)[t] = g;
#pragma unroll 1
  for (int b = threadIdx.x; b < blocks;) {
    uint2 codes;
    const uint32_t scale = quantise_block(block, largest_of_block, g, codes);
    store_8(codes_to + b * 8, codes);
    store_1(scales_to + b, scale);
    b += kThreads;
    if (b < blocks) {
      block = load_block(from, b);
      largest_of_block = largest_magnitude(block);
    }
  }
}

__global__ void __launch_bounds__(kThreads, 2)
    stage_tokens(const __grid_constant__ View v, const __grid_constant__ StageArguments a) {
  extern __shared__ int shared[];
  const int top_k = static_cast<int>(v.top_k);
  const int blocks = static_cast<int>(v.hidden_size / 16);
  const int row_bytes = 32 * blocks;

  // A thread keeps its first block of a token, which is all of x up to a hidden size of 8192. That
  // of the next token is on its way meanwhile.
  const auto first_block = [&](int t) {
    return v.nvfp4 && threadIdx.x < blocks && t < a.rows
               ? load_block(row_at(a.x, t, row_bytes), threadIdx.x)
               : Block16{};
  };

  wait_for_previous_kernel();
  let_next_kernel_start();
  Block16 next = first_block(static_cast<int>(blockIdx.x));
  int n = a.rows;
  if (a.num_tokens) {
    const int given = *a.num_tokens;
    n = min(max(given, 0), a.rows);
    if (n != given && blockIdx.x == 0 && threadIdx.x == 0) {
      report_bad_input(v, kBadNumTokens, 0, 0, given);
    }
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) *v.mine<int32_t>(v.num_tokens) = n;

  const int stride = static_cast<int>(gridDim.x);
  for (int t = static_cast<int>(blockIdx.x), turn = 0; t < n; t += stride, turn ^= 1) {
    // Loaded here, looked at when they have come. By the last warp, which has the fewest blocks.
    const bool routes = threadIdx.x / 32 == kWarps - 1;
    const int slot = threadIdx.x % 32;
    const bool has_slot = routes && slot < top_k;
    const int64_t at = static_cast<int64_t>(t) * top_k + slot;
    const int id = has_slot ? a.topk_idx[at] : -1;
    const float weight = has_slot ? a.topk_weights[at] : 0.f;
    if (v.nvfp4) {
      const Block16 first = next;
      next = first_block(t + stride);
      quantise_token(v, a, t, first, reinterpret_cast<uint32_t*>(shared) + turn * kWarps);
    } else {
      const char* from = row_at(a.x, t, row_bytes);
      char* to = row_at(v.mine<char>(v.x), t, row_bytes);
      for (int b = threadIdx.x; b < 2 * blocks; b += kThreads) {
        store_16(to + b * 16, load_16(from + b * 16));
      }
    }
    if (!routes) continue;
    if (has_slot) {
      const bool good = id >= -1 && id < v.num_experts;
      if (!good) report_bad_input(v, kBadExpert, t, slot, id);
      v.mine<int32_t>(v.topk_idx)[at] = good ? id : -1;
      v.mine<float>(v.topk_weights)[at] = weight;
    }
    const int owner = v.experts().owner(id);
#pragma unroll 1
    for (int word = 0; word < v.owner_words(); ++word) {
      const uint32_t bit = owner >= 0 && owner / 32 == word ? 1u << owner % 32 : 0u;
      const uint32_t mask = __reduce_or_sync(~0u, bit);
      if (slot == 0) v.owners_of(word)[t] = mask;
    }
  }
}

}  // namespace megamoe::comm
