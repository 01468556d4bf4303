// csrc's decoding of packed weights, run on the host for every thread of a warpgroup, and what CuTe
// says of the matrix elements that wgmma takes a thread's registers for.
#include "gemm/sm90/mma.cuh"  // before CuTe's own headers: it asks them for all tile widths

#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "gemm/sm90/decode.cuh"

namespace {

namespace sm90 = megamoe::sm90;

template <int N>
using Traits = cute::MMA_Traits<typename sm90::Atom<N>::Type>;
using ALayout = typename Traits<8>::ALayout;
using CLayout = typename Traits<176>::CLayout;

template <int... i>
constexpr bool same_a_layout(std::integer_sequence<int, i...>) {
  return (std::is_same_v<ALayout, typename Traits<8 * (i + 1)>::ALayout> && ...);
}
static_assert(same_a_layout(std::make_integer_sequence<int, 176 / 8>()));

uint32_t word_at(const uint8_t* bytes) {
  uint32_t word;
  std::memcpy(&word, bytes, 4);
  return word;
}

float from_bf16(uint32_t bits) {
  const uint32_t wide = bits << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

template <int strip>
void decode_step(const uint8_t* stage, int block, int step, int thread, float (&values)[8]) {
  const uint32_t word = word_at(stage + 4096 * block + 2048 * strip + 16 * thread + 4 * step);
  const uint32_t scales = sm90::scales_of<strip>(word_at(stage + 8192 + 8 * thread + 4 * block));
  const uint32_t turned = sm90::rotated(word);
  const uint32_t codes[4] = {sm90::codes_of<0>(word, turned), sm90::codes_of<1>(word, turned),
                             sm90::codes_of<2>(word, turned), sm90::codes_of<3>(word, turned)};
  for (int i = 0; i < 4; ++i) {
    const float scale = from_bf16(i % 2 ? scales >> 16 : scales & 0xFFFF);
    values[2 * i] = from_bf16(codes[i] & 0xFFFF) * scale;
    values[2 * i + 1] = from_bf16(codes[i] >> 16) * scale;
  }
}

}  // namespace

// Packed weights [slabs, stages, 9216] to fp32 [128 * slabs, 128 * stages], in packed row order and with
// columns by lane.
extern "C" void decode_weights(const uint8_t* packed, int slabs, int stages, float* weights) {
  const int blocks = 2 * stages;
  for (int slab = 0; slab < slabs; ++slab) {
    for (int block = 0; block < blocks; ++block) {
      const uint8_t* stage = packed + 9216ll * (slab * stages + block / 2);
      for (int strip = 0; strip < 2; ++strip) {
        for (int step = 0; step < 4; ++step) {
          for (int thread = 0; thread < 128; ++thread) {
            float values[8];
            (strip ? decode_step<1> : decode_step<0>)(stage, block % 2, step, thread, values);
            for (int v = 0; v < 8; ++v) {
              const int at = ALayout{}(thread, v);  // row + 64 * column
              const int64_t row = 128ll * slab + 64 * strip + at % 64;
              const int64_t column = 64 * block + 16 * step + at / 64;
              weights[row * 64 * blocks + column] = values[v] * sm90::kUnscale;
            }
          }
        }
      }
    }
  }
}

// Of the tile of 176 tokens, row + 64 * token of accumulator v of a thread: int32 [128, 88].
extern "C" void accumulator_places(int32_t* places) {
  for (int thread = 0; thread < 128; ++thread) {
    for (int v = 0; v < 88; ++v) places[88 * thread + v] = CLayout{}(thread, v);
  }
}
