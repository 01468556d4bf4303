// Where SM100's block-scaled MMA wants the block scales of an operand: 128 x 4 tiles of 512 bytes.
//
// An operand has a row for each output (weights) or token (activations), and in each row one UE4M3
// scale for every 16 elements of K: [rows, Ksf], Ksf = K / 16. In memory the scales of 128 rows x 4
// are a tile of 512 consecutive bytes; tiles of the same rows follow one another along K. Inside a
// tile, row r and scale k lie at (r % 32) * 16 + (r / 32) * 4 + k: the tensor core's memory has 32
// lanes of 16 bytes, and each takes the scales of rows r, r + 32, r + 64 and r + 96.
// Rows and Ksf are rounded up to whole tiles; what no scale fills is zero.
//
// Both operands have this layout, CUTLASS's SFA and SFB. CUTLASS counts K in elements, so its
// layout is to be asked for coordinate (row, 16 * k). Proof: tests/blackwell/test_layout.py.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace megamoe::sm100 {

constexpr int kTileRows = 128;
constexpr int kTileScales = 4;  // along K
constexpr int kTileBytes = kTileRows * kTileScales;

MEGAMOE_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Scales of a row, rounded up to whole tiles.
MEGAMOE_HD constexpr int64_t padded_scales(int64_t ksf) {
  return ceil_div(ksf, kTileScales) * kTileScales;
}

// Bytes of the scales of `rows` rows.
MEGAMOE_HD constexpr int64_t scale_bytes(int64_t rows, int64_t ksf) {
  return ceil_div(rows, kTileRows) * kTileRows * padded_scales(ksf);
}

// Byte of scale k of a row.
MEGAMOE_HD constexpr int64_t scale_offset(int64_t row, int64_t k, int64_t ksf) {
  const int64_t tile = row / kTileRows * ceil_div(ksf, kTileScales) + k / kTileScales;
  const int64_t r = row % kTileRows;
  return tile * kTileBytes + r % 32 * 16 + r / 32 * 4 + k % kTileScales;
}

// Brings the scales of a matrix, [rows, ksf] row by row, into `to`, which is zero before.
inline void remap_scales(const uint8_t* from, int64_t rows, int64_t ksf, uint8_t* to) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t k = 0; k < ksf; ++k) to[scale_offset(row, k, ksf)] = from[row * ksf + k];
  }
}

}  // namespace megamoe::sm100
