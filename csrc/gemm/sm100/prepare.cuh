// The input of a grouped GEMM: rows of bf16 to codes and block scales, and the groups' arrays.
//
// Rows arrive as bf16 that is exactly E2M1 code x UE4M3 scale, as the layer's other kernels leave
// them; `recover` finds such a pair again. So the layer's exchange and this GEMM know nothing of
// one another, at the cost of one more pass over the rows: 2 K bytes read and 9/16 K written each.
//
//   reads   expert_offsets, rows of the experts
//   writes  codes, scales (zero where a tile has no row or no column), the groups' arrays
// Floor: those bytes over memory bandwidth.
#pragma once

#include "gemm/sm100/groups.h"
#include "numerics/nvfp4.h"

namespace megamoe::sm100 {

constexpr int kThreads = 256;

// Offsets and first tiles of all experts, both [experts + 1].
MEGAMOE_HD constexpr int64_t prepare_shared_bytes(int experts) { return 8 * (experts + 1); }

// The last expert whose entry of an ascending array is at most `at`.
MEGAMOE_HD int expert_of(const int* first, int experts, int at) {
  int low = 0, high = experts;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (first[middle] <= at) low = middle;
    else high = middle;
  }
  return low;
}

// Packs block `b` of a row, 16 elements, and returns its scale.
MEGAMOE_HD uint8_t pack_block(const __nv_bfloat16* row, int64_t b, uint8_t* codes) {
  const uint4* words = reinterpret_cast<const uint4*>(row) + 2 * b;
  float x[kBlock];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint4 word = words[half];
    const uint32_t pairs[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[8 * half + 2 * i] = from_bf16(pairs[i] & 0xffffu);
      x[8 * half + 2 * i + 1] = from_bf16(pairs[i] >> 16);
    }
  }
  const QuantisedBlock block = recover(x);
  reinterpret_cast<uint64_t*>(codes)[b] = block.codes;
  return block.scale;
}

// Row `p` of the tiles of all experts, one after another; each lane takes every 32nd block.
MEGAMOE_HD void pack_row(const GroupedCall& call, const __nv_bfloat16* rows, const int* offsets,
                         const int* tiles, int p, int lane) {
  const int expert = expert_of(tiles, call.experts, p / kTileRows);
  const int in_expert = p - tiles[expert] * kTileRows;
  const int64_t row = offsets[expert] + in_expert;
  const bool filled = row < offsets[expert + 1];
  const int64_t ksf = call.k / kBlock, columns = padded_scales(ksf);
  uint8_t* scales = call.scales + tiles[expert] * kTileRows * columns;
  for (int64_t b = lane; b < columns; b += 32) {
    uint8_t scale = 0;
    if (filled && b < ksf) {
      scale = pack_block(rows + row * call.k, b, call.codes + row * (call.k / 2));
    }
    scales[scale_offset(in_expert, b, ksf)] = scale;
  }
}

#ifdef __CUDACC__

__global__ void __launch_bounds__(kThreads)
    prepare(const __grid_constant__ Groups groups, const __grid_constant__ GroupedCall call,
            const __nv_bfloat16* rows) {
  extern __shared__ int shared[];
  int* offsets = shared;
  int* tiles = shared + call.experts + 1;
  for (int e = threadIdx.x; e <= call.experts; e += kThreads) offsets[e] = call.expert_offsets[e];
  __syncthreads();
  for (int e = threadIdx.x; e <= call.experts; e += kThreads) {
    tiles[e] = first_tile(offsets, e);
    if (blockIdx.x == 0 && e < call.experts) describe_group(groups, call, e, tiles[e]);
  }
  __syncthreads();
  const int padded_rows = tiles[call.experts] * kTileRows;
  const int step = gridDim.x * kThreads / 32;
  for (int p = (blockIdx.x * kThreads + threadIdx.x) / 32; p < padded_rows; p += step) {
    pack_row(call, rows, offsets, tiles, p, threadIdx.x % 32);
  }
}

#endif

}  // namespace megamoe::sm100
