// SwiGLU of L1's accumulators, and requantisation: what megamoe_ep/kernels/portable.py's l1 does
// after its product. The global scales come in here, gate's and up's apart, in fp32.
//
//   reads   gate_up fp32 [rows, 2I], row_scales, expert_offsets, alpha, input_scale
//   writes  out bf16 [rows, I]: code x block scale, exact; the global scale is left to L2's alpha
// Floor: 10 I bytes a row over memory bandwidth.
#pragma once

#include "gemm/sm100/prepare.cuh"

namespace megamoe::sm100 {

struct SwigluCall {
  int experts;
  int intermediate;
  const int32_t* expert_offsets;  // [experts + 1]
  const float* gate_up;           // [rows, 2 intermediate]: gate, then up
  const float* row_scales;        // [rows]
  const float* alpha;             // [experts, 2]: of gate, of up
  const float* input_scale;       // [experts], global scale of the result
  float clamp;                    // infinity: none
  __nv_bfloat16* out;             // [rows, intermediate]
};

// silu(min(gate, clamp)) * clip(up, -clamp, clamp). NaN goes through.
MEGAMOE_HD float swiglu(float gate, float up, float clamp) {
  gate = gate > clamp ? clamp : gate;
  up = up > clamp ? clamp : up < -clamp ? -clamp : up;
  return gate / (1.0f + expf(-gate)) * up;
}

// Block `b` of a row, 16 outputs.
MEGAMOE_HD void swiglu_block(const SwigluCall& call, int expert, int64_t row, int b) {
  const int64_t width = call.intermediate;
  const float4* gate = reinterpret_cast<const float4*>(call.gate_up + row * 2 * width) + 4 * b;
  const float4* up = gate + width / 4;
  const float row_scale = call.row_scales[row];
  const float gate_alpha = call.alpha[2 * expert], up_alpha = call.alpha[2 * expert + 1];
  float h[kBlock];
#pragma unroll
  for (int i = 0; i < kBlock / 4; ++i) {
    const float4 g = gate[i], u = up[i];
    const float gates[4] = {g.x, g.y, g.z, g.w}, ups[4] = {u.x, u.y, u.z, u.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      h[4 * i + j] = swiglu(gates[j] * row_scale * gate_alpha, ups[j] * row_scale * up_alpha,
                            call.clamp);
    }
  }
  const QuantisedBlock block = quantise(h, call.input_scale[expert]);
  const float scale = decode_ue4m3(block.scale);
  __nv_bfloat162 result[kBlock / 2];
#pragma unroll
  for (int i = 0; i < kBlock / 2; ++i) {
    result[i] = __floats2bfloat162_rn(decode_e2m1(code_of(block, 2 * i)) * scale,
                                      decode_e2m1(code_of(block, 2 * i + 1)) * scale);
  }
  memcpy(call.out + row * width + b * kBlock, result, sizeof(result));
}

#ifdef __CUDACC__

__global__ void __launch_bounds__(kThreads) swiglu_and_requantise(
    const __grid_constant__ SwigluCall call) {
  extern __shared__ int offsets[];
  for (int e = threadIdx.x; e <= call.experts; e += kThreads) offsets[e] = call.expert_offsets[e];
  __syncthreads();
  const int blocks = call.intermediate / kBlock;
  const int64_t total = static_cast<int64_t>(offsets[call.experts]) * blocks;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = first; i < total; i += step) {
    const int row = static_cast<int>(i / blocks);
    swiglu_block(call, expert_of(offsets, call.experts, row), row, static_cast<int>(i % blocks));
  }
}

#endif

}  // namespace megamoe::sm100
