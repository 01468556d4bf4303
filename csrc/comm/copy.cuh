// Rows as they travel: copied by warps in the widest pieces that their length allows.
#pragma once

#include <cstdint>

#include "comm/ptx.cuh"

namespace megamoe::comm {

template <typename Piece>
struct Pieces;

template <>
struct Pieces<uint4> {
  static __device__ __forceinline__ uint4 load(const void* p) { return load_16(p); }
  static __device__ __forceinline__ void store(void* p, uint4 v) { store_16(p, v); }
};

template <>
struct Pieces<uint32_t> {
  static __device__ __forceinline__ uint32_t load(const void* p) { return load_4(p); }
  static __device__ __forceinline__ void store(void* p, uint32_t v) { store_4(p, v); }
};

template <>
struct Pieces<uint8_t> {
  static __device__ __forceinline__ uint32_t load(const void* p) { return load_1(p); }
  static __device__ __forceinline__ void store(void* p, uint32_t v) { store_1(p, v); }
};

constexpr int kPart = 2048;  // bytes of a row that one warp copies at a time: 4 x 16 bytes a lane

template <typename Piece, typename ForEachPlace>
__device__ __forceinline__ void copy_pieces(const char* from, int begin, int end, int lane,
                                            ForEachPlace&& for_each_place) {
  constexpr int kInFlight = 4;
  constexpr int kStride = 32 * sizeof(Piece);
  // All lanes make the same rounds: for_each_place may exchange values between them.
  for (int first = begin; first < end; first += kInFlight * kStride) {
    const int at = first + lane * static_cast<int>(sizeof(Piece));
    decltype(Pieces<Piece>::load(from)) piece[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (at + i * kStride < end) piece[i] = Pieces<Piece>::load(from + at + i * kStride);
    }
    for_each_place([&](char* to) {
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (at + i * kStride < end) Pieces<Piece>::store(to + at + i * kStride, piece[i]);
      }
    });
  }
}

// Copies bytes begin..end of a row of `row_bytes` bytes, read once, to every place that
// for_each_place(store) hands to `store`. Rows start at multiples of their length from an address
// that is a multiple of 256, so the length says how wide a piece may be.
template <typename ForEachPlace>
__device__ __forceinline__ void copy_row(const char* from, int row_bytes, int begin, int end,
                                         int lane, ForEachPlace&& for_each_place) {
  if (row_bytes % 16 == 0) {
    copy_pieces<uint4>(from, begin, end, lane, for_each_place);
  } else if (row_bytes % 4 == 0) {
    copy_pieces<uint32_t>(from, begin, end, lane, for_each_place);
  } else {
    copy_pieces<uint8_t>(from, begin, end, lane, for_each_place);
  }
}

}  // namespace megamoe::comm
