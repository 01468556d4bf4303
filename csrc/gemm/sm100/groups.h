// The arrays by which CUTLASS's grouped GEMM learns of its groups, one entry for each expert, in
// device memory; and how an entry follows from the expert's rows. Host and device.
#pragma once

#include "cute/layout.hpp"
#include "cutlass/detail/sm100_blockscaled_layout.hpp"
#include "layout/sm100.h"

namespace megamoe::sm100 {

using Problem = cute::Shape<int, int, int>;                           // outputs, tokens, K
using WeightStride = cute::Stride<int64_t, cute::_1, cute::_0>;       // row, K
using TokenStride = cute::Stride<int64_t, cute::_1, cute::_0>;        // row, K
using OutStride = cute::Stride<cute::_1, int64_t, cute::_0>;          // output, token
using ScaleConfig = cutlass::detail::Sm1xxBlockScaledConfig<16>;
using ScaleLayout = ScaleConfig::LayoutSF;

struct Groups {
  Problem* shapes;
  const void** weights;
  const void** weight_scales;
  const void** tokens;
  const void** token_scales;
  void** out;
  const float** alphas;
  WeightStride* weight_strides;
  TokenStride* token_strides;
  OutStride* out_strides;
  ScaleLayout* weight_scale_layouts;
  ScaleLayout* token_scale_layouts;
};

// One grouped GEMM: tensors that hold all experts, expert after expert.
struct GroupedCall {
  int experts;
  int n;                         // outputs of an expert
  int k;                         // a multiple of 32
  const int32_t* expert_offsets; // [experts + 1], first row of each
  const uint8_t* weights;        // E2M1 [experts, n, k / 2]
  const uint8_t* weight_scales;  // UE4M3 [experts, scale_bytes(n, k / 16)]
  uint8_t* codes;                // E2M1 [rows, k / 2]
  uint8_t* scales;               // UE4M3; each expert's begin with a tile of their own
  char* out;                     // [rows, n]
  int out_bytes;                 // of an element
  const float* alphas;           // [experts], or null: the accumulators as they are
};

// The first tile of 128 rows of an expert's token scales: experts share none.
MEGAMOE_HD int first_tile(const int32_t* expert_offsets, int expert) {
  int tiles = 0;
  for (int e = 0; e < expert; ++e) {
    tiles += (expert_offsets[e + 1] - expert_offsets[e] + kTileRows - 1) / kTileRows;
  }
  return tiles;
}

// Writes the entry of one expert, whose token scales begin with tile `tile`.
MEGAMOE_HD void describe_group(const Groups& groups, const GroupedCall& call, int expert,
                                        int tile) {
  const int first = call.expert_offsets[expert];
  const int tokens = call.expert_offsets[expert + 1] - first;
  const int64_t e = expert, n = call.n, ksf = call.k / 16, row_bytes = call.k / 2;
  const Problem shape = cute::make_shape(call.n, tokens, call.k);
  groups.shapes[e] = shape;
  groups.weights[e] = call.weights + e * n * row_bytes;
  groups.weight_scales[e] = call.weight_scales + e * scale_bytes(n, ksf);
  groups.tokens[e] = call.codes + first * row_bytes;
  groups.token_scales[e] = call.scales + scale_bytes(static_cast<int64_t>(tile) * kTileRows, ksf);
  groups.out[e] = call.out + first * n * call.out_bytes;
  groups.alphas[e] = call.alphas ? call.alphas + e : nullptr;
  groups.weight_strides[e] = cute::make_stride(int64_t{call.k}, cute::_1{}, cute::_0{});
  groups.token_strides[e] = cute::make_stride(int64_t{call.k}, cute::_1{}, cute::_0{});
  groups.out_strides[e] = cute::make_stride(cute::_1{}, int64_t{call.n}, cute::_0{});
  groups.weight_scale_layouts[e] = ScaleConfig::tile_atom_to_shape_SFA(shape);
  groups.token_scale_layouts[e] = ScaleConfig::tile_atom_to_shape_SFB(shape);
}

}  // namespace megamoe::sm100
