// Rows as they travel: copied by warps in the widest pieces that their length allows.
#pragma once

#include <cstdint>

#include "comm/ptx.cuh"
#include "host_device.h"

namespace megamoe::comm {

// Rows of one kind, and the parts that warps copy them in. Rows start at multiples of their length from
// an address that is a multiple of 256, so the length says how wide a piece may be: 16, 4 or 1 byte.
struct Rows {
  static constexpr int kMostPieces = 4;

  // Of one piece a lane, or of kMostPieces.
  MEGAMOE_HD Rows(int row_bytes, bool small_parts = false) : bytes(row_bytes) {
    width_log2 = row_bytes % 16 == 0 ? 4 : row_bytes % 4 == 0 ? 2 : 0;
    const int part_log2 = 5 + width_log2 + (small_parts ? 0 : 2);
    part_bytes = 1 << part_log2;
    parts = (row_bytes + part_bytes - 1) >> part_log2;
  }

  int bytes;
  int width_log2;
  int part_bytes;
  int parts;
};

// A lane's pieces of a part: loaded once, stored at as many places as they go to.
struct Part {
  uint4 piece[Rows::kMostPieces];

  __device__ __forceinline__ void load(const char* row, const Rows& rows, int part) {
    for_each(rows, part, [&](uint4& p, int at, auto width) {
      if constexpr (width == 16) p = load_16(row + at);
      if constexpr (width == 4) p.x = load_4(row + at);
      if constexpr (width == 1) p.x = load_1(row + at);
    });
  }

  __device__ __forceinline__ void store(char* row, const Rows& rows, int part) {
    for_each(rows, part, [&](const uint4& p, int at, auto width) {
      if constexpr (width == 16) store_16(row + at, p);
      if constexpr (width == 4) store_4(row + at, p.x);
      if constexpr (width == 1) store_1(row + at, p.x);
    });
  }

 private:
  template <int n>
  struct Width {
    constexpr operator int() const { return n; }
  };

  template <typename Visit>
  __device__ __forceinline__ void for_each(const Rows& rows, int part, Visit&& visit) {
    if (rows.width_log2 == 4) {
      for_each(rows, part, visit, Width<16>());
    } else if (rows.width_log2 == 2) {
      for_each(rows, part, visit, Width<4>());
    } else {
      for_each(rows, part, visit, Width<1>());
    }
  }

  template <typename Visit, int width>
  __device__ __forceinline__ void for_each(const Rows& rows, int part, Visit&& visit, Width<width> w) {
    const int first = static_cast<int>(threadIdx.x) % 32 * width;
    const int begin = part * rows.part_bytes;
#pragma unroll
    for (int i = 0; i < Rows::kMostPieces; ++i) {
      const int in_part = first + i * 32 * width;
      if (in_part < rows.part_bytes && begin + in_part < rows.bytes) {
        visit(piece[i], begin + in_part, w);
      }
    }
  }
};

}  // namespace megamoe::comm
