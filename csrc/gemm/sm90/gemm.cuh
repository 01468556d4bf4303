// The grouped GEMM of one projection on Hopper: out[r, :] = epilogue(W[expert of r] x[r, :]).
//
// Reads: tokens bf16 [R, K] by expert, left by dispatch (L1) or by L1 (L2); packed weights; the
// experts' first rows, which only the device knows. Writes: rows of bf16, of tokens alone.
// Floor: max(weight bytes of experts with rows / memory bandwidth, 2 R N K / bf16 rate).
//
// One block an SM. Producer warps copy k64 blocks into a ring of stages. Two consumer warpgroups, of
// 128 weight rows each, decode weights from shared memory into registers and multiply them with the
// tokens in shared memory; they decode one group of k16 steps while wgmma works on the one before.
// An output is summed over k in one order, whatever the tile's width and whoever its neighbours are.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cute/arch/copy_sm90_desc.hpp>
#include <cutlass/arch/reg_reconfig.h>

#include "dependent_launch.cuh"
#include "gemm/sm90/decode.cuh"
#include "gemm/sm90/epilogue.cuh"
#include "gemm/sm90/mma.cuh"
#include "gemm/sm90/pipeline.cuh"
#include "gemm/sm90/schedule.cuh"

namespace megamoe::sm90 {

constexpr int kStrips = 2;  // m64 blocks of a warpgroup
constexpr int kConsumers = kWeightRows / 64 / kStrips;  // warpgroups
constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
constexpr int kProducerRegisters = 40;
constexpr int kConsumerRegisters = 232;

// Maps of the same tokens, for boxes of 16, 32 and 64 rows, each 64 of k wide.
struct TokenMaps {
  CUtensorMap rows16;
  CUtensorMap rows32;
  CUtensorMap rows64;
};

struct Problem {
  const uint8_t* weights;   // [L, N/128, K/64, kSlabBlockBytes]
  const int32_t* offsets;   // [L + 1]
  const float* row_scales;  // [R], L1 only
  Outputs outputs;
  int experts;
  int n;
  int k;
};

struct Shared {
  uint8_t ring[kRingBytes];
  uint8_t staging[2][kStagingBytes];  // of each consumer warpgroup
  float scales[2][kMaxTokens];        // of its tile's rows
  Barriers barriers;
  int widest;                         // tile
  int plan[1];                        // offsets[L + 1], first_tiles[L + 1]
};

MEGAMOE_HD int shared_bytes(int experts) {
  return static_cast<int>(sizeof(Shared)) + 8 * (experts + 1);
}

// TMA's 128-byte swizzle repeats every 1024 bytes.
extern __shared__ __align__(1024) uint8_t shared_memory[];

__device__ __forceinline__ Shared& shared() { return *reinterpret_cast<Shared*>(shared_memory); }

// Tiles up to here are narrow: memory or decoding is their bound, not the tensor cores.
constexpr int kNarrow = 64;

// Codes and scales of one thread for a k64 block of 128 rows.
struct Packed {
  uint4 codes[kStrips];
  uint4 scales;

  __device__ __forceinline__ void load(uint32_t slab_block) {
    const uint32_t thread = threadIdx.x % kWarpgroup;
    codes[0] = load_shared_16(slab_block + 16 * thread);
    codes[1] = load_shared_16(slab_block + 2048 + 16 * thread);
    scales = load_shared_16(slab_block + kScalesAt + 16 * (thread / 4));
  }

  template <int step>
  __device__ __forceinline__ uint32_t word(int strip) const {
    const uint4& c = codes[strip];
    return step == 0 ? c.x : step == 1 ? c.y : step == 2 ? c.z : c.w;
  }

  template <int step>
  __device__ __forceinline__ uint32_t scale_word(int strip) const {
    return step < 2 ? (strip ? scales.z : scales.x) : (strip ? scales.w : scales.y);
  }
};

__device__ __forceinline__ uint32_t product(uint32_t codes, __nv_bfloat162 scale) {
  __nv_bfloat162 pair;
  memcpy(&pair, &codes, 4);
  pair = __hmul2(pair, scale);
  memcpy(&codes, &pair, 4);
  return codes;
}

template <int step>
__device__ __forceinline__ void decode(const Packed& packed, int strip, uint32_t (&a)[4]) {
  const uint32_t word = packed.word<step>(strip);
  const uint32_t scales = scales_of<step % 2>(packed.scale_word<step>(strip));
  __nv_bfloat162 both;
  memcpy(&both, &scales, 4);
  const __nv_bfloat162 r0 = __low2bfloat162(both);
  const __nv_bfloat162 r8 = __high2bfloat162(both);
  a[0] = product(codes_of<0>(word), r0);
  a[1] = product(codes_of<1>(word), r8);
  a[2] = product(codes_of<2>(word), r0);
  a[3] = product(codes_of<3>(word), r8);
}

// `count` k16 steps of a block from step `first` on.
template <int first, int count>
__device__ __forceinline__ void decode_group(const Packed& packed,
                                             uint32_t (&fragments)[count][kStrips][4]) {
  [&]<int... i>(std::integer_sequence<int, i...>) {
    ((decode<first + i>(packed, 0, fragments[i][0]), decode<first + i>(packed, 1, fragments[i][1])),
     ...);
  }(std::make_integer_sequence<int, count>());
}

// Lets the producer have a stage back, once every consumer warp has said so.
__device__ __forceinline__ void release(uint32_t empty) {
  if (threadIdx.x % 32 == 0) arrive(empty);
}

// Has the fragments computed by here. ptxas would move most of a decode below the wait that follows
// it, away from the wgmma that it is to overlap with; a branch that needs them, and that is never
// taken, stops it.
template <int count>
__device__ __forceinline__ void compute_by_here(const uint32_t (&fragments)[count][kStrips][4],
                                                bool never) {
  if (never) {
#pragma unroll
    for (int i = 0; i < count * kStrips * 4; ++i) {
      asm volatile("st.shared.u32 [%0], %1;" ::"r"(0),
                   "r"(fragments[i / 4 / kStrips][i / 4 % kStrips][i % 4]));
    }
  }
}

// The same number in every thread of a warp, known to be so to the compiler, which then keeps it and
// what follows from it where wgmma wants its descriptors.
__device__ __forceinline__ uint32_t uniform(uint32_t x) { return __reduce_or_sync(~0u, x); }

template <int Size>
__device__ __forceinline__ void clear(float (&acc)[kStrips][Size]) {
#pragma unroll
  for (int i = 0; i < kStrips * Size; ++i) acc[i / Size][i % Size] = 0;
}

// Hands wgmma `count` k16 steps of a tile `width` tokens wide, which is from kTokenStep * low to
// kTokenStep * high. Widths are told apart here, in the loop over k: ptxas gives the fragments of
// every loop that they are in flight in registers of their own, and would run out. Comparisons, not a
// jump table: with one ptxas gives up overlapping wgmma.
template <int low, int high, int Size, int count>
__device__ __forceinline__ void multiply_group(float (&acc)[kStrips][Size],
                                               const uint32_t (&fragments)[count][kStrips][4],
                                               uint64_t tokens, int width) {
  constexpr int middle = (low + high) / 2;
  if constexpr (low < high) {
    if (width <= kTokenStep * middle) {
      multiply_group<low, middle>(acc, fragments, tokens, width);
    } else {
      multiply_group<middle + 1, high>(acc, fragments, tokens, width);
    }
  } else {
    cute::warpgroup_arrive();
#pragma unroll
    for (int i = 0; i < count; ++i) {
#pragma unroll
      for (int mb = 0; mb < kStrips; ++mb) {
        multiply_add<kTokenStep * low>(acc[mb], fragments[i][mb], tokens + i * (32 >> 4));
      }
    }
    cute::warpgroup_commit_batch();
  }
}

// The sum of a tile over all of k; the warpgroup's weights are slab `half` of each stage.
//
// A narrow one: all four steps of a block are a group. The next block is decoded while wgmma works on
// this one, from codes that were loaded a block earlier.
__device__ __forceinline__ void accumulate(float (&acc)[kStrips][kNarrow / 2], Ring& ring,
                                           int k_blocks, int half, int width) {
  uint32_t fragments[2][4][kStrips][4];
  Packed packed;  // of the block that is decoded next
  const bool never = k_blocks < 0;
  clear(acc);
  const auto load = [&] {
    ring.wait_full();
    packed.load(ring.weights() + half * kSlabBlockBytes);
    const Place place = ring.place();
    ring.advance();
    return place;
  };
  Place now = load();  // of the block that is multiplied
  decode_group<0>(packed, fragments[0]);
  Place next = load();

  // K is a multiple of 128: two blocks a turn, so that the fragments' turns are known here.
#pragma unroll 1
  for (int pair = 0; pair < k_blocks; pair += 2) {
#pragma unroll
    for (int turn = 0; turn < 2; ++turn) {
      multiply_group<1, kNarrow / kTokenStep>(acc, fragments[turn],
                                              token_descriptor(uniform(now.tokens)), width);
      // After the last block once more, for nothing.
      decode_group<0>(packed, fragments[turn ^ 1]);
      compute_by_here(fragments[turn ^ 1], never);
      const uint32_t done = now.empty;
      now = next;
      if (pair + turn + 2 < k_blocks) next = load();
      cute::warpgroup_wait<0>();
      release(done);
    }
  }
  pin(acc[0]);
  pin(acc[1]);
}

// A wide one: a step is a group. It is decoded while wgmma works on the step before, and handed over
// before that one is waited for: the tensor cores always have a step of this warpgroup to go on with.
__device__ __forceinline__ void accumulate(float (&acc)[kStrips][kMaxTokens / 2], Ring& ring,
                                           int k_blocks, int half, int width) {
  uint32_t fragments[2][1][kStrips][4];
  Packed packed;  // of the block that is decoded next
  clear(acc);
  const auto load = [&] {
    ring.wait_full();
    packed.load(ring.weights() + half * kSlabBlockBytes);
    const Place place = ring.place();
    ring.advance();
    return place;
  };
  Place now = load();  // of the block that is multiplied
  Place next = now;
  uint32_t done = 0;  // barrier of the block before
  decode_group<0>(packed, fragments[0]);

#pragma unroll 1
  for (int block = 0; block < k_blocks; ++block) {
    const uint64_t tokens = token_descriptor(uniform(now.tokens));
    [&]<int... step>(std::integer_sequence<int, step...>) {
      (([&] {
         multiply_group<kNarrow / kTokenStep + 1, kMaxTokens / kTokenStep>(
             acc, fragments[step % 2], tokens + step * (32 >> 4), width);
         cute::warpgroup_wait<1>();
         if constexpr (step == 0) {
           if (block > 0) release(done);
         }
         // After the last block once more, for nothing.
         decode_group<(step + 1) % 4>(packed, fragments[(step + 1) % 2]);
         if constexpr (step == 2) {
           if (block + 1 < k_blocks) next = load();
         }
       }()),
       ...);
    }(std::make_integer_sequence<int, 4>());
    done = now.empty;
    now = next;
  }
  cute::warpgroup_wait<0>();
  release(done);
  pin(acc[0]);
  pin(acc[1]);
}

// The producer warps. What one thread can issue beside 8 or 16 busy warps is not enough to feed them,
// so each has its share of every stage: two warps a slab of weights each, two warps the tokens.
constexpr int kWeightWarps = 2;

__device__ __forceinline__ void produce_weights(const Problem& p, Ring ring, Walk walk, int warp) {
  const int k_blocks = p.k / kBlockK;
  const int all_slabs = p.n / kSlabRows;
  for (; walk.valid(); walk.advance(gridDim.x)) {
    const Tile tile = walk.tile();
    const int slab = 2 * tile.weight_tile + warp;
    const bool there = slab < all_slabs;
    const uint32_t bytes = min(2, all_slabs - 2 * tile.weight_tile) * kSlabBlockBytes +
                           loaded_rows(walk.width()) * kTokenBytes;
    const uint8_t* from = p.weights + (static_cast<int64_t>(tile.expert) * all_slabs + slab) *
                                          k_blocks * kSlabBlockBytes;
#pragma unroll 1
    for (int block = 0; block < k_blocks; ++block) {
      ring.wait_empty();
      if (warp == 0) arrive_and_expect(ring.full(), bytes);
      if (there) {
        copy_bulk(ring.weights() + warp * kSlabBlockBytes, from, kSlabBlockBytes, ring.full(),
                  kEvictFirst);
      }
      from += kSlabBlockBytes;
      ring.advance();
    }
  }
}

// A tile's tokens come in boxes of 64 rows, then 32, then 16; the warps take them in turn, at most
// two each.
template <bool kGated>
__device__ __forceinline__ void produce_tokens(const Problem& p, const TokenMaps& maps, Ring ring,
                                               Walk walk, int warp) {
  // L1 may still be at work on them; weights do not wait for it.
  if constexpr (!kGated) wait_for_previous_kernel();
  const int k_blocks = p.k / kBlockK;
  for (; walk.valid(); walk.advance(gridDim.x)) {
    const Tile tile = walk.tile();
    const int width = walk.width();
    int boxes = 0;
    int rows[2] = {0, 0};
    const CUtensorMap* map[2] = {nullptr, nullptr};
    for (int row = 0, turn = 0; row < width; turn ^= 1) {
      const int size = width - row >= 64 ? 64 : width - row >= 32 ? 32 : 16;
      if (turn == warp) {
        const CUtensorMap* of_size = size == 64 ? &maps.rows64 : size == 32 ? &maps.rows32
                                                                            : &maps.rows16;
        if (boxes == 0) {
          rows[0] = row;
          map[0] = of_size;
        } else {
          rows[1] = row;
          map[1] = of_size;
        }
        ++boxes;
      }
      row += size;
    }
#pragma unroll 1
    for (int block = 0; block < k_blocks; ++block) {
      ring.wait_empty();
      if (boxes > 0) {
        copy_box(ring.tokens() + rows[0] * kTokenBytes, map[0], block * kBlockK,
                 tile.first_row + rows[0], ring.full(), kEvictLast);
      }
      if (boxes > 1) {
        copy_box(ring.tokens() + rows[1] * kTokenBytes, map[1], block * kBlockK,
                 tile.first_row + rows[1], ring.full(), kEvictLast);
      }
      ring.advance();
    }
  }
}

// One tile of this warpgroup's half of the weights, at most kWidest tokens wide.
template <int kWidest, bool kGated>
__device__ __forceinline__ void consume(const Problem& p, Ring& ring, const Walk& walk, int width) {
  float acc[kStrips][kWidest / 2];
  accumulate(acc, ring, p.k / kBlockK, thread_read_anew() / kWarpgroup, width);
  const Tile tile = walk.tile();
  const int half = thread_read_anew() / kWarpgroup;
  const Staging staging = {shared_address(shared().staging[half]), shared().scales[half], 1 + half};
  store_outputs<kWidest, kGated>(acc, p.outputs, staging, tile.expert, 2 * tile.weight_tile + half,
                                 tile.first_row, min(tile.end_row, tile.first_row + width));
}

template <bool kGated>
__device__ __forceinline__ void consume_all(const Problem& p, Ring ring, Walk walk, int half) {
  for (; walk.valid(); walk.advance(gridDim.x)) {
    const int width = uniform(walk.width());
    {
      const Tile tile = walk.tile();
      if (2 * tile.weight_tile + half >= p.n / kSlabRows) {
        for (int b = 0; b < p.k / kBlockK; ++b) {
          ring.wait_full();
          release(ring.empty());
          ring.advance();
        }
        continue;
      }
      if constexpr (kGated) {
        // Everyone is through with the last tile's scales at the last barrier of its epilogue.
        for (int t = threadIdx.x % kWarpgroup; t < width; t += kWarpgroup) {
          const int row = tile.first_row + t;
          shared().scales[half][t] = row < tile.end_row ? p.row_scales[row] : 0.0f;
        }
      }
    }
    if (width <= kNarrow) {
      consume<kNarrow, kGated>(p, ring, walk, width);
    } else {
      consume<kMaxTokens, kGated>(p, ring, walk, width);
    }
  }
  wait_stores_done();
}

// first_tiles[L + 1] from offsets[L + 1]; returns the widest tile's width. By one warp.
__device__ __forceinline__ int plan(const int* offsets, int* first_tiles, int experts) {
  const int lane = threadIdx.x % 32;
  int sum = 0;
  int widest = 8;
  if (lane == 0) first_tiles[0] = 0;
  for (int base = 0; base < experts; base += 32) {
    const int e = base + lane;
    const int rows = e < experts ? offsets[e + 1] - offsets[e] : 0;
    int tiles = token_tiles(rows);
    widest = max(widest, tile_width(rows));
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(~0u, tiles, step);
      if (lane >= step) tiles += other;
    }
    if (e < experts) first_tiles[e + 1] = sum + tiles;
    sum += __shfl_sync(~0u, tiles, 31);
  }
  return __reduce_max_sync(~0u, widest);
}

template <bool kGated>
__global__ void __launch_bounds__(kThreads, 1)
    grouped_gemm(const __grid_constant__ Problem p, const __grid_constant__ TokenMaps maps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const uint32_t barriers = shared_address(&shared().barriers);
  int* offsets = shared().plan;
  int* first_tiles = offsets + p.experts + 1;

  const int warpgroup = threadIdx.x / kWarpgroup;
  if (threadIdx.x == 0) {
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&maps.rows16));
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&maps.rows32));
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&maps.rows64));
    for (int s = 0; s < kMaxStages; ++s) {
      init_barrier(barriers + 8 * s, 1);
      init_barrier(barriers + 8 * (kMaxStages + s), 4 * kConsumers);
    }
    cutlass::arch::fence_barrier_init();
  }
  // L1 runs after dispatch, which lays out the rows; L2 after L1, which let it start once dispatch was
  // done: the offsets are there, the tokens may not be.
  if constexpr (kGated) wait_for_previous_kernel();
  let_next_kernel_start();
  for (int e = threadIdx.x; e <= p.experts; e += kThreads) offsets[e] = p.offsets[e];
  __syncthreads();
  if (threadIdx.x < 32) {
    const int width = plan(offsets, first_tiles, p.experts);
    if (threadIdx.x == 0) shared().widest = width;
  }
  __syncthreads();

  const int weight_tiles = ceil_div(p.n, kWeightRows);
  const Walk walk(offsets, first_tiles, p.experts, weight_tiles, static_cast<int>(blockIdx.x));
  const Ring ring(shared_address(shared().ring), barriers, shared().widest);
  if (warpgroup == kConsumers) {
    cutlass::arch::warpgroup_reg_dealloc<kProducerRegisters>();
    const int warp = threadIdx.x % kWarpgroup / 32;
    if (threadIdx.x % 32 == 0) {
      if (warp < kWeightWarps) {
        produce_weights(p, ring, walk, warp);
      } else {
        produce_tokens<kGated>(p, maps, ring, walk, warp - kWeightWarps);
      }
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<kConsumerRegisters>();
    consume_all<kGated>(p, ring, walk, warpgroup);
  }
#endif
}

}  // namespace megamoe::sm90
