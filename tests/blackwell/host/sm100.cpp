// What csrc prepares for the SM100 GEMMs, run on the host, and what CUTLASS itself makes of it: its
// layouts, and its own reference of a block-scaled GEMM.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "cute/tensor.hpp"
#include "cutlass/util/reference/host/gett.hpp"
#include "gemm/sm100/prepare.cuh"
#include "gemm/sm100/scratch.h"
#include "gemm/sm100/swiglu.cuh"
#include "layout/sm100.h"

using namespace megamoe;
using namespace megamoe::sm100;

namespace {

ScaleLayout cutlass_layout(bool tokens, int rows, int k) {
  // The other operand's rows must not matter.
  if (tokens) return ScaleConfig::tile_atom_to_shape_SFB(cute::make_shape(7, rows, k));
  return ScaleConfig::tile_atom_to_shape_SFA(cute::make_shape(rows, 7, k));
}

// One expert's GEMM by CUTLASS's reference, from the entry that the product wrote for it.
template <class Out>
void multiply_group(const Groups& g, int e) {
  const auto [m, n, k] = g.shapes[e];
  using Code = cutlass::float_e2m1_t;
  using Scale = cutlass::float_ue4m3_t;
  const auto matrix = [&](const void* codes, int rows, auto stride) {
    return cute::make_tensor(cute::recast_ptr<Code>(const_cast<void*>(codes)),
                             cute::make_layout(cute::make_shape(rows, k, 1), stride));
  };
  const auto scales = [&](const void* bytes, const ScaleLayout& layout) {
    return cute::make_tensor(reinterpret_cast<Scale*>(const_cast<void*>(bytes)), layout);
  };
  auto a = matrix(g.weights[e], m, g.weight_strides[e]);
  auto b = matrix(g.tokens[e], n, g.token_strides[e]);
  auto sfa = scales(g.weight_scales[e], g.weight_scale_layouts[e]);
  auto sfb = scales(g.token_scales[e], g.token_scale_layouts[e]);
  auto d = cute::make_tensor(reinterpret_cast<Out*>(g.out[e]),
                             cute::make_layout(cute::make_shape(m, n, 1), g.out_strides[e]));
  Out zero{0};  // the reference multiplies beta = 0 with it all the same
  auto c = cute::make_tensor(
      &zero, cute::make_layout(d.shape(), cute::repeat_like(d.shape(), cute::_0{})));
  cutlass::reference::host::GettBlockScalingMainloopParams<float, decltype(a), decltype(sfa),
                                                           decltype(b), decltype(sfb)>
      mainloop{a, sfa, b, sfb};
  cutlass::reference::host::GettBlockScalingEpilogueParams<float, float, float, decltype(c),
                                                           decltype(d)>
      epilogue{g.alphas[e] ? *g.alphas[e] : 1.0f, 0.0f, c, d};
  cutlass::reference::host::Gett(mainloop, epilogue);
}

// The work of the kernel `prepare`, for one block after another.
void prepare_on_host(const Groups& groups, const GroupedCall& call, const __nv_bfloat16* rows) {
  std::vector<int> tiles(call.experts + 1);
  for (int e = 0; e <= call.experts; ++e) {
    tiles[e] = first_tile(call.expert_offsets, e);
    if (e < call.experts) describe_group(groups, call, e, tiles[e]);
  }
  for (int p = 0; p < tiles[call.experts] * kTileRows; ++p) {
    for (int lane = 0; lane < 32; ++lane) {
      pack_row(call, rows, call.expert_offsets, tiles.data(), p, lane);
    }
  }
}

}  // namespace

extern "C" {

// Byte of every scale [rows, ksf] as CUTLASS has it; returns the bytes that it needs.
int64_t cutlass_offsets(int tokens, int rows, int ksf, int64_t* offsets, int64_t* filtered) {
  const ScaleLayout layout = cutlass_layout(tokens, rows, 16 * ksf);
  const auto by_scale = cute::filter_zeros(layout);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t k = 0; k < ksf; ++k) {
      offsets[row * ksf + k] = layout(cute::make_coord(int(row), int(16 * k), 0));
      filtered[row * ksf + k] = by_scale(cute::make_coord(int(row), int(k), 0));
    }
  }
  return cute::cosize(layout);
}

int64_t our_offsets(int rows, int ksf, int64_t* offsets) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t k = 0; k < ksf; ++k) offsets[row * ksf + k] = scale_offset(row, k, ksf);
  }
  return scale_bytes(rows, ksf);
}

void remap(const uint8_t* from, int rows, int ksf, uint8_t* to) {
  remap_scales(from, rows, ksf, to);
}

// Blocks of 16 bf16 to 8 bytes of codes and a scale each.
void recover_blocks(const uint16_t* rows, int64_t blocks, uint8_t* codes, uint8_t* scales) {
  for (int64_t b = 0; b < blocks; ++b) {
    scales[b] = pack_block(reinterpret_cast<const __nv_bfloat16*>(rows), b, codes);
  }
}

int64_t scratch_bytes(int64_t rows, int experts, int hidden, int intermediate, int sms) {
  return lay_out_scratch(0, {rows, experts, hidden, intermediate, sms}).bytes;
}

// Where the parts of the scratch memory lie, for a look at what was written.
void scratch_places(int64_t memory, int64_t rows, int experts, int hidden, int intermediate,
                    int sms, int64_t* places) {
  const Scratch s = lay_out_scratch(memory, {rows, experts, hidden, intermediate, sms});
  places[0] = reinterpret_cast<int64_t>(s.codes);
  places[1] = reinterpret_cast<int64_t>(s.scales);
  places[2] = reinterpret_cast<int64_t>(s.gate_up);
  places[3] = reinterpret_cast<int64_t>(s.workspace);
}

// As gemm_sm100_l1, up to the accumulators, which go to the scratch memory's gate_up.
void l1_accumulators(int64_t memory, int64_t rows, int experts, int hidden, int intermediate,
                     int sms, const __nv_bfloat16* x, const int32_t* offsets, const uint8_t* codes,
                     const uint8_t* scales) {
  const Sizes sizes = {rows, experts, hidden, intermediate, sms};
  const Scratch s = lay_out_scratch(memory, sizes);
  const GroupedCall call = l1_call(s, sizes, offsets, codes, scales);
  prepare_on_host(s.groups, call, x);
  for (int e = 0; e < experts; ++e) multiply_group<float>(s.groups, e);
}

// The rest of gemm_sm100_l1.
void activate(int experts, int intermediate, const int32_t* offsets, const float* gate_up,
              const float* row_scales, const float* alpha, const float* input_scale, float clamp,
              __nv_bfloat16* out) {
  const SwigluCall call = {experts, intermediate, offsets, gate_up, row_scales,
                           alpha, input_scale, clamp, out};
  for (int row = 0; row < offsets[experts]; ++row) {
    for (int b = 0; b < intermediate / kBlock; ++b) {
      swiglu_block(call, expert_of(offsets, experts, row), row, b);
    }
  }
}

// As gemm_sm100_l2; with out_bytes = 4 the output is fp32.
void l2_output(int64_t memory, int64_t rows, int experts, int hidden, int intermediate, int sms,
               const __nv_bfloat16* h, const int32_t* offsets, const uint8_t* codes,
               const uint8_t* scales, const float* alpha, char* out, int out_bytes) {
  const Sizes sizes = {rows, experts, hidden, intermediate, sms};
  const Scratch s = lay_out_scratch(memory, sizes);
  GroupedCall call = l2_call(s, sizes, offsets, codes, scales, alpha, out);
  call.out_bytes = out_bytes;
  prepare_on_host(s.groups, call, h);
  for (int e = 0; e < experts; ++e) {
    if (out_bytes == 4) multiply_group<float>(s.groups, e);
    else multiply_group<cutlass::bfloat16_t>(s.groups, e);
  }
}
}
