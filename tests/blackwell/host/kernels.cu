// The kernels beside the SM100 GEMMs, launched on whatever GPU there is: nothing in them is Blackwell's.
#include <cuda_runtime.h>

#include "gemm/sm100/prepare.cuh"
#include "gemm/sm100/scratch.h"
#include "gemm/sm100/swiglu.cuh"

using namespace megamoe::sm100;

namespace {

GroupedCall call_of(const Scratch& s, const Sizes& sizes, const int32_t* offsets) {
  // Addresses that are looked at by nobody here.
  const auto* weights = reinterpret_cast<const uint8_t*>(int64_t{1} << 40);
  const auto* scales = reinterpret_cast<const uint8_t*>(int64_t{1} << 41);
  return l1_call(s, sizes, offsets, weights, scales);
}

}  // namespace

extern "C" {

// What lies where in the scratch memory: [groups' end, codes, scales, all bytes].
void places(int64_t rows, int experts, int hidden, int intermediate, int64_t* at) {
  const Scratch s = lay_out_scratch(0, {rows, experts, hidden, intermediate, 1});
  at[0] = at[1] = reinterpret_cast<int64_t>(s.codes);
  at[2] = reinterpret_cast<int64_t>(s.scales);
  at[3] = s.bytes;
}

int run_prepare(int64_t memory, int64_t rows, int experts, int hidden, int intermediate, int blocks,
                const int32_t* offsets, const __nv_bfloat16* x) {
  const Sizes sizes = {rows, experts, hidden, intermediate, 1};
  const Scratch s = lay_out_scratch(memory, sizes);
  prepare<<<blocks, kThreads, prepare_shared_bytes(experts)>>>(s.groups, call_of(s, sizes, offsets),
                                                               x);
  return cudaDeviceSynchronize();
}

// The groups' arrays for scratch memory at `memory`, written by the host to `host_memory`.
void describe(int64_t host_memory, int64_t memory, int64_t rows, int experts, int hidden,
              int intermediate, const int32_t* offsets) {
  const Sizes sizes = {rows, experts, hidden, intermediate, 1};
  const Scratch there = lay_out_scratch(memory, sizes);
  const Scratch here = lay_out_scratch(host_memory, sizes);
  for (int e = 0; e < experts; ++e) {
    describe_group(here.groups, call_of(there, sizes, offsets), e, first_tile(offsets, e));
  }
}

int run_swiglu(int experts, int intermediate, int blocks, const int32_t* offsets,
               const float* gate_up, const float* row_scales, const float* alpha,
               const float* input_scale, float clamp, __nv_bfloat16* out) {
  const SwigluCall call = {experts, intermediate, offsets, gate_up, row_scales,
                           alpha,   input_scale,  clamp,   out};
  swiglu_and_requantise<<<blocks, kThreads, prepare_shared_bytes(experts)>>>(call);
  return cudaDeviceSynchronize();
}
}
