// Memory that the SM100 GEMMs keep between their kernels, carved from one allocation. L1 and L2
// take turns with it. Host only.
#pragma once

#include <type_traits>

#include "gemm/sm100/groups.h"

namespace megamoe::sm100 {

struct Sizes {
  int64_t rows;  // the most that all experts together receive
  int experts;
  int hidden;
  int intermediate;
  int sms;
};

struct Scratch {
  Groups groups;
  uint8_t* codes;   // packed rows of the GEMM's input, [rows, K / 2]
  uint8_t* scales;  // their block scales, experts on tiles of their own
  float* gate_up;   // L1's accumulators, [rows, 2 intermediate]
  char* workspace;  // CUTLASS's: a set of tensor maps for each SM
  int64_t bytes;
};

constexpr int64_t kAlignment = 256;
constexpr int64_t kWorkspacePerSm = 4 * 128;  // maps of A, B and their scales; see scratch_bytes

// Where everything lies from address `memory`, a multiple of 256, on; with 0, how much there is.
inline Scratch lay_out_scratch(int64_t memory, const Sizes& s) {
  const int64_t start = memory;
  Scratch scratch{};
  const auto place = [&](auto*& array, int64_t count) {
    using Element = std::remove_reference_t<decltype(*array)>;
    array = reinterpret_cast<Element*>(memory);
    memory += ceil_div(count * static_cast<int64_t>(sizeof(Element)), kAlignment) * kAlignment;
  };
  Groups& g = scratch.groups;
  place(g.shapes, s.experts);
  place(g.weights, s.experts);
  place(g.weight_scales, s.experts);
  place(g.tokens, s.experts);
  place(g.token_scales, s.experts);
  place(g.out, s.experts);
  place(g.alphas, s.experts);
  place(g.weight_strides, s.experts);
  place(g.token_strides, s.experts);
  place(g.out_strides, s.experts);
  place(g.weight_scale_layouts, s.experts);
  place(g.token_scale_layouts, s.experts);

  const int64_t k = s.hidden > s.intermediate ? s.hidden : s.intermediate;
  // Each expert with rows rounds them up to whole tiles.
  const int64_t with_rows = s.rows < s.experts ? s.rows : s.experts;
  const int64_t padded_rows = (s.rows + with_rows * (kTileRows - 1)) / kTileRows * kTileRows;
  place(scratch.codes, s.rows * (k / 2));
  place(scratch.scales, padded_rows * padded_scales(k / 16));
  place(scratch.gate_up, s.rows * 2 * s.intermediate);
  place(scratch.workspace, s.sms * kWorkspacePerSm);
  scratch.bytes = memory - start;
  return scratch;
}

// rows [R, H] times w13, to fp32 accumulators.
inline GroupedCall l1_call(const Scratch& scratch, const Sizes& s, const int32_t* expert_offsets,
                           const uint8_t* weights, const uint8_t* weight_scales) {
  return {s.experts, 2 * s.intermediate, s.hidden, expert_offsets, weights, weight_scales,
          scratch.codes, scratch.scales, reinterpret_cast<char*>(scratch.gate_up),
          static_cast<int>(sizeof(float)), nullptr};
}

// h [R, I] times w2, to bf16.
inline GroupedCall l2_call(const Scratch& scratch, const Sizes& s, const int32_t* expert_offsets,
                           const uint8_t* weights, const uint8_t* weight_scales,
                           const float* alphas, char* out) {
  return {s.experts, s.hidden, s.intermediate, expert_offsets, weights, weight_scales,
          scratch.codes, scratch.scales, out, 2, alphas};
}

}  // namespace megamoe::sm100
