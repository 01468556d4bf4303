// The grouped GEMM of one projection on Hopper: out[r, :] = epilogue(W[expert of r] x[r, :]).
//
// Reads: tokens bf16 [R, K] by expert, left by dispatch (L1) or by L1 (L2), with columns by lane
// (megamoe_ep/prepack/sm90.py); packed weights; the experts' first rows, which only the device knows.
// Writes: rows of bf16, of tokens alone; L2's to the ranks that the tokens are of, if told so.
// Floor: max(weight bytes of experts with rows / memory bandwidth, 2 R N K / bf16 rate).
//
// One block an SM. Producer warps copy pairs of k64 blocks into a ring of stages. Each consumer
// warpgroup has a slab of 128 weight rows: it decodes weights from shared memory into registers and
// multiplies them with the tokens in shared memory.
//
// wgmma and other instructions want the same ports of the register file: while one warp's is at work,
// the others' run at half their rate or slow it down. So instructions count, however they overlap.
//
// An output is summed over k in one order, whatever the tile's width and whoever its neighbours are.
#pragma once

#include <cuda_bf16.h>

#include "dependent_launch.cuh"
#include "gemm/sm90/decode.cuh"
#include "gemm/sm90/epilogue.cuh"
#include "gemm/sm90/mma.cuh"
#include "gemm/sm90/pipeline.cuh"
#include "gemm/sm90/schedule.cuh"

namespace megamoe::sm90 {

constexpr int kStrips = 2;  // m64 blocks of a slab

// What a block is made of, for each way to cut a GEMM: registers of a thread; the k16 steps that are
// decoded and handed to wgmma at a time, as many as registers allow.
template <typename Cut>
struct Block;

template <>
struct Block<Few> {
  static constexpr int kProducerRegisters = 32;
  static constexpr int kConsumerRegisters = 112;
  static constexpr int kGroup = 4;
};

template <>
struct Block<Many> {
  static constexpr int kProducerRegisters = 40;
  static constexpr int kConsumerRegisters = 232;
  static constexpr int kGroup = 2;
};

// A consumer warpgroup for each slab, and the producers.
template <typename Cut>
constexpr int kThreads = (Cut::kSlabs + 1) * kWarpgroup;

// Maps of the same tokens, a box for each width of a tile, 64 of k wide.
template <typename Cut>
struct TokenMaps {
  CUtensorMap of_width[Cut::kMaxTokens / kTokenStep];
};

struct Problem {
  const uint8_t* weights;  // [L, N/128, K/128, kSlabStageBytes]
  const int32_t* offsets;  // [L + 1]
  Outputs outputs;
  int experts;
  int n;
  int k;
};

template <typename Cut>
struct Shared {
  Staging<Cut> staging[Cut::kSlabs];  // of each consumer warpgroup
  Barriers barriers;
  Tile tiles[kMaxTiles];              // under way, in turn
  int token_rows;                     // of a stage
  int plan[1];                        // offsets[L + 1], first_tiles[L + 1], order[L]
};

// The ring has what is left of shared memory. TMA's 128-byte swizzle repeats every 1024 bytes.
constexpr int kSwizzleBytes = 1024;
constexpr int kMostExperts = 1024;  // megamoe_ep/prepack: MAX_EXPERTS
template <typename Cut>
MEGAMOE_HD constexpr int ring_at(int experts) {
  const int before = static_cast<int>(sizeof(Shared<Cut>)) + 4 * (3 * experts + 1);
  return ceil_div(before, kSwizzleBytes) * kSwizzleBytes;
}
static_assert(ring_at<Few>(kMostExperts) + 3 * stage_bytes<Few>(2 * Few::kMaxTokens) <= kSharedBytes);
static_assert(ring_at<Many>(kMostExperts) + 3 * stage_bytes<Many>(Many::kMaxTokens) <= kSharedBytes);

extern __shared__ __align__(1024) uint8_t shared_memory[];

template <typename Cut>
__device__ __forceinline__ Shared<Cut>& shared() {
  return *reinterpret_cast<Shared<Cut>*>(shared_memory);
}

// Codes of one thread for a k64 block of a slab.
struct Codes {
  uint4 strips[kStrips];

  __device__ __forceinline__ void load(uint32_t address) {
    strips[0] = load_shared_16(address);
    strips[1] = load_shared_16(address + 2048);
  }

  __device__ __forceinline__ uint32_t word(int strip, int step) const {
    const uint4& c = strips[strip];
    return step == 0 ? c.x : step == 1 ? c.y : step == 2 ? c.z : c.w;
  }
};

__device__ __forceinline__ uint32_t product(uint32_t codes, __nv_bfloat162 scale) {
  __nv_bfloat162 pair;
  memcpy(&pair, &codes, 4);
  pair = __hmul2(pair, scale);
  memcpy(&codes, &pair, 4);
  return codes;
}

// A word of codes and the scales of its two rows to the registers of a fragment.
__device__ __forceinline__ void decode(uint32_t word, uint32_t scales, uint32_t (&a)[4]) {
  const uint32_t turned = rotated(word);
  __nv_bfloat162 both;
  memcpy(&both, &scales, 4);
  const __nv_bfloat162 r0 = __low2bfloat162(both);
  const __nv_bfloat162 r8 = __high2bfloat162(both);
  a[0] = product(codes_of<0>(word, turned), r0);
  a[1] = product(codes_of<1>(word, turned), r8);
  a[2] = product(codes_of<2>(word, turned), r0);
  a[3] = product(codes_of<3>(word, turned), r8);
}

template <typename Cut>
using Accumulators = float[kStrips][Cut::kMaxTokens / 2];

// The sum of a tile N tokens wide over all of k, for this warpgroup's slab. A warp decodes kGroup k16
// steps, hands them to wgmma and waits for it; meanwhile the scheduler's other warps do the same.
template <typename Cut, int N>
__device__ __forceinline__ void accumulate(Accumulators<Cut>& acc, Ring& ring, int tokens_at,
                                           int stages) {
  constexpr int kGroup = Block<Cut>::kGroup;
  const uint32_t thread = thread_read_anew();
  // Of a stage at the ring's begin; offsets of the others are added.
  const uint32_t slab_at = ring.memory() + thread / kWarpgroup * kSlabStageBytes;
  const uint32_t codes_at = slab_at + thread % kWarpgroup * 16;
  const uint32_t scales_at = slab_at + kScalesAt + thread % kWarpgroup * 8;
  const uint32_t first_tokens = low_descriptor(ring.memory() + tokens_at);
  Codes codes;   // of the block that is decoded next
  uint2 scales;  // of the stage, a word for each block
  const auto load = [&](uint32_t offset) {
    codes.load(offset + codes_at);
    scales = load_shared_8(offset + scales_at);
  };
#pragma unroll
  for (int i = 0; i < N; ++i) acc[i % 2][i / 2] = 0;

  ring.wait_full();
  load(ring.offset());
#pragma unroll 1
  for (int stage = 0; stage < stages; ++stage) {
    const uint32_t here = ring.offset();
    const uint32_t empty = ring.empty();
    // In 64 bits all the way: ptxas then adds in place instead of putting each one together.
    const uint64_t tokens = kSwizzle128 | kPatternStride | uniform(first_tokens + here / 16);
    uint32_t pairs[kStrips];  // of scales
#pragma unroll
    for (int group = 0; group < kStageBlocks * 4 / kGroup; ++group) {
      const int block = group * kGroup / 4;
      const int first = group * kGroup % 4;
      if (first == 0) {
        pairs[0] = scales_of<0>(block ? scales.y : scales.x);
        pairs[1] = scales_of<1>(block ? scales.y : scales.x);
      }
      uint32_t fragments[kGroup][kStrips][4];
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        decode(codes.word(0, first + i), pairs[0], fragments[i][0]);
        decode(codes.word(1, first + i), pairs[1], fragments[i][1]);
      }
      if (first + kGroup == 4) {
        if (block == 0) {
          codes.load(here + codes_at + kBlockCodeBytes);
          ring.advance();
        } else {
          // After the last stage, for nothing, the first of the next tile or what says that there is none:
          // a choice would take instructions.
          ring.wait_full();
          load(ring.offset());
        }
      }
      pin(acc[0]);
      pin(acc[1]);
      begin_products();
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const uint64_t at = tokens + (block * token_block_bytes(N) + (first + i) * 32) / 16;
        multiply_add<N>(acc[0], fragments[i][0], at);
        multiply_add<N>(acc[1], fragments[i][1], at);
      }
      wait_for_products();
    }
    arrive(empty);  // each thread for itself: it is its own reads that must be over
  }
  pin(acc[0]);
  pin(acc[1]);
}

// Comparisons, as ptxas gives up overlapping wgmma where it sees a jump table.
template <typename Cut, int low = 1, int high = Cut::kMaxTokens / kTokenStep>
__device__ __forceinline__ void accumulate(Accumulators<Cut>& acc, Ring& ring, int tokens_at,
                                           int stages, int width) {
  constexpr int middle = (low + high) / 2;
  if constexpr (low == high) {
    accumulate<Cut, kTokenStep * low>(acc, ring, tokens_at, stages);
  } else if (width <= kTokenStep * middle) {
    accumulate<Cut, low, middle>(acc, ring, tokens_at, stages, width);
  } else {
    accumulate<Cut, middle + 1, high>(acc, ring, tokens_at, stages, width);
  }
}

// Where a stage has the tokens of a tile's first part, or of its second.
template <typename Cut>
__device__ __forceinline__ int tokens_at(const Tile& tile, bool second) {
  const int weights = Cut::kSlabs * kSlabStageBytes;
  return second ? weights + kStageBlocks * token_block_bytes(tile.first.width) : weights;
}

template <typename Cut>
__device__ __forceinline__ Ring make_ring(uint32_t barriers, int experts) {
  const int at = ring_at<Cut>(experts);
  return Ring(shared_address(shared_memory + at), kSharedBytes - at, barriers,
              stage_bytes<Cut>(shared<Cut>().token_rows));
}

// The producer warp that tells consumers of a tile, and how much of a stage to wait for. Of all four it is
// the one that can bring nothing at all: late by a turn of the ring, such a one would take one turn for
// another, and nobody would notice. Warp 0 always brings weights, the last two tokens.
constexpr int kTeller = 1;

// A producer warp, of which one thread works. Consumers wait for every instruction of its scheduler, so
// the four share each stage: warp w brings the weights of slab w, if there is one; the last two also a
// block each of the first part's tokens, and the first two of the second's.
template <typename Cut>
__device__ __forceinline__ void produce(const Problem& p, const TokenMaps<Cut>& maps, Ring ring,
                                        Walk<Cut> walk, int warp) {
  constexpr int kOfSecond = kWarps - kStageBlocks;
  const bool of_first = warp >= kOfSecond;  // the tokens
  const int block = of_first ? warp - kOfSecond : warp;
  const int all_slabs = p.n / kSlabRows;
  const int of_slab = p.k / kStageK * kSlabStageBytes;
  bool waits = !p.outputs.gated;
  int turn = 0;
  while (walk.valid()) {
    const Tile tile = walk.tile();
    const Part& first = tile.first;
    const Part& second = tile.second;
    if (warp == kTeller) {
      ring.wait_empty();
      shared<Cut>().tiles[turn] = tile;
    }
    const uint32_t bytes = (first.slabs + second.slabs) * kSlabStageBytes +
                           kStageBlocks * (token_block_bytes(first.width) +
                                           (second.slabs ? token_block_bytes(second.width) : 0));
    const bool brings_weights = warp < first.slabs + second.slabs;
    const int slab = warp < first.slabs
                         ? first.expert * all_slabs + first.slab + warp
                         : second.expert * all_slabs + second.slab + warp - first.slabs;
    const uint8_t* from = p.weights + static_cast<int64_t>(slab) * of_slab;
    const Part part = of_first ? first : second;
    const bool brings_tokens = part.slabs > 0;
    const CUtensorMap* map = &maps.of_width[part.width / kTokenStep - 1];
    const int to_tokens = tokens_at<Cut>(tile, !of_first) + block * token_block_bytes(part.width);
#pragma unroll 1
    for (int column = block * kBlockK; column < p.k; column += kStageK) {
      ring.wait_empty();
      const uint32_t full = ring.full();
      if (warp == kTeller) arrive_and_expect(full, bytes);
      if (brings_weights) {
        copy_bulk(ring.stage() + warp * kSlabStageBytes, from, kSlabStageBytes, full, kEvictFirst);
        from += kSlabStageBytes;
      }
      if (brings_tokens) {
        if (waits) wait_for_previous_kernel();  // L1 may be at work on them
        waits = false;
        copy_box(ring.stage() + to_tokens, map, column, part.first_row, full, kEvictLast);
      }
      ring.advance();
    }
    walk.advance(tile);
    turn = (turn + 1) % kMaxTiles;
  }
  if (warp == kTeller) {
    // Also without a tile: L2 must not end, and let what follows write over offsets, while L1 is at work.
    wait_for_previous_kernel();
    ring.wait_empty();
    shared<Cut>().tiles[turn] = {};
    arrive(ring.full());
  }
}

// What a warpgroup has of a tile: from its own slab on, if `slabs` is not below 1.
__device__ __forceinline__ Part part_of(const Tile& tile, int warpgroup) {
  const int of_second = warpgroup - tile.first.slabs;
  Part part = of_second < 0 ? tile.first : tile.second;
  const int before = of_second < 0 ? warpgroup : of_second;
  part.slab += before;
  part.slabs -= before;
  return part;
}

template <typename Cut>
__device__ __forceinline__ void consume(const Problem& p, uint32_t barriers) {
  const int stages = p.k / kStageK;
  wait(barriers, 0);  // for the first stage, before which all is planned
  // Of many, one warpgroup is some way behind the other: so one multiplies while the other stores.
  constexpr uint32_t kBehindNs = 1200;
  if (!Cut::kShares && threadIdx.x >= kWarpgroup) sleep(kBehindNs);
  Ring ring = make_ring<Cut>(barriers, p.experts);
  const auto staging = [&]() -> Staging<Cut>& {
    return shared<Cut>().staging[thread_read_anew() / kWarpgroup];
  };
  for (int turn = 0;; turn = (turn + 1) % kMaxTiles) {
    ring.wait_full();
    const Tile& tile = shared<Cut>().tiles[turn];
    if (tile.first.slabs == 0) break;
    const auto my_part = [&] { return part_of(tile, thread_read_anew() / kWarpgroup); };
    const Part part = my_part();
    if (part.slabs <= 0) {
      for (int stage = 0; stage < stages; ++stage) {
        ring.wait_full();
        arrive(ring.empty());
        ring.advance();
      }
      continue;
    }
    fetch_scales<Cut>(staging(), p.outputs, part);
    Accumulators<Cut> acc;
    const bool second = thread_read_anew() / kWarpgroup >= tile.first.slabs;
    accumulate<Cut>(acc, ring, tokens_at<Cut>(tile, second), stages, uniform(part.width));
    const Part same = my_part();  // anew, so that it takes no registers meanwhile
    if (p.outputs.gated) {
      store_outputs<Cut, true>(acc, p.outputs, staging(), same);
    } else {
      store_outputs<Cut, false>(acc, p.outputs, staging(), same);
    }
  }
}

// Fills in the experts' order from their rows. By one warp.
template <typename Cut>
__device__ __forceinline__ void sort_by_width(const int* offsets, int* order, int experts) {
  constexpr int kWidths = Cut::kMaxTokens / kTokenStep + 1;  // 0 is one
  const int lane = threadIdx.x % 32;
  const auto width_of = [&](int e) {
    return e < experts ? tile_width<Cut>(offsets[e + 1] - offsets[e]) / kTokenStep : -1;
  };
  int next[kWidths] = {};  // place of the next expert with this width
#pragma unroll 1
  for (int base = 0; base < experts; base += 32) {
    const int mine = width_of(base + lane);
#pragma unroll
    for (int width = 0; width < kWidths; ++width) {
      next[width] += __popc(__ballot_sync(~0u, mine > width));
    }
  }
#pragma unroll 1
  for (int base = 0; base < experts; base += 32) {
    const int mine = width_of(base + lane);
#pragma unroll
    for (int width = 0; width < kWidths; ++width) {
      const uint32_t same = __ballot_sync(~0u, mine == width);
      if (mine == width) order[next[width] + __popc(same & ((1u << lane) - 1))] = base + lane;
      next[width] += __popc(same);
    }
  }
  __syncwarp();
}

// Fills in the plan from the offsets; returns how many rows of tokens a stage may have. By one warp.
template <typename Cut>
__device__ __forceinline__ int make_plan(const int* offsets, int* first_tiles, int* order,
                                         int experts) {
  const int lane = threadIdx.x % 32;
  const int places = Cut::kShares ? pairs_of(experts) : experts;
  const auto rows_of = [&](int e) { return offsets[e + 1] - offsets[e]; };
  if constexpr (Cut::kShares) sort_by_width<Cut>(offsets, order, experts);
  int sum = 0;
  int most = kTokenStep;
  if (lane == 0) first_tiles[0] = 0;
#pragma unroll 1
  for (int base = 0; base < places; base += 32) {
    const int place = base + lane;
    int tiles = 0;
    if (place < places) {
      const int rows = rows_of(Cut::kShares ? order[place] : place);  // the wide one of a pair
      tiles = token_tiles<Cut>(rows);
      int token_rows = tile_width<Cut>(rows);
      if constexpr (Cut::kShares) {
        // A tile's second part is of the pair's other expert. The next pair's would have no more rows, but
        // for pairs of one expert with rows.
        const int other = experts - 1 - place;
        const int narrow = other != place ? rows_of(order[other]) : 0;
        const int next = place + 1 < places ? rows_of(order[place + 1]) : 0;
        tiles += token_tiles<Cut>(narrow);
        token_rows += tile_width<Cut>(narrow > 0 ? narrow : next);
      }
      most = max(most, token_rows);
    }
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(~0u, tiles, step);
      if (lane >= step) tiles += other;
    }
    if (place < places) first_tiles[place + 1] = sum + tiles;
    sum += __shfl_sync(~0u, tiles, 31);
  }
  return __reduce_max_sync(~0u, most);
}

// L1 and L2 are one kernel, as one's instructions are then at hand when the other begins.
template <typename Cut>
__global__ void __launch_bounds__(kThreads<Cut>, 1)
    grouped_gemm(const __grid_constant__ Problem p, const __grid_constant__ TokenMaps<Cut> maps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const uint32_t barriers = shared_address(&shared<Cut>().barriers);
  const int warpgroup = threadIdx.x / kWarpgroup;
  const int thread = threadIdx.x % kWarpgroup;
  int* offsets = shared<Cut>().plan;
  // L1 runs after dispatch, which lays out the rows; L2 after L1, which let it start once dispatch was
  // done: the offsets are there (in L2, not to be taken from L1), the tokens may not be.
  if (p.outputs.gated) wait_for_previous_kernel();
  let_next_kernel_start();
  if (warpgroup == Cut::kSlabs) {
#pragma unroll 1
    for (int e = thread; e <= p.experts; e += kWarpgroup) offsets[e] = load_from_l2(p.offsets + e);
  } else if (threadIdx.x == 0) {
    for (int s = 0; s < kMaxStages; ++s) {
      init_barrier(barriers + 8 * s, 1);
      init_barrier(barriers + 8 * (kMaxStages + s), kWarpgroup * Cut::kSlabs);
    }
    show_barriers();
  }
  __syncthreads();
  // What setmaxnreg shares out is what the block was launched with; it waits for ever for more.
  constexpr int kLaunched = (1 << 16) / kThreads<Cut> / 8 * 8;
  static_assert(Cut::kSlabs * Block<Cut>::kConsumerRegisters + Block<Cut>::kProducerRegisters <=
                (Cut::kSlabs + 1) * kLaunched);
  if (warpgroup == Cut::kSlabs) {
    int* first_tiles = offsets + p.experts + 1;
    int* order = first_tiles + p.experts + 1;
    const int map = thread - 32;  // not by the first warp, which all wait for
    if (map >= 0 && map < Cut::kMaxTokens / kTokenStep) prefetch_map(&maps.of_width[map]);
    if (thread < 32) {
      const int token_rows = make_plan<Cut>(offsets, first_tiles, order, p.experts);
      if (thread == 0) shared<Cut>().token_rows = token_rows;
    }
    sync_warpgroup();
    give_registers_back<Block<Cut>::kProducerRegisters>();
    const Walk<Cut> walk({offsets, first_tiles, order}, p.experts, p.n / kSlabRows,
                         static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x));
    const Ring ring = make_ring<Cut>(barriers, p.experts);
    if (one_lane()) produce<Cut>(p, maps, ring, walk, thread / 32);
  } else {
    take_registers<Block<Cut>::kConsumerRegisters>();
    consume<Cut>(p, barriers);
  }
#endif
}

}  // namespace megamoe::sm90
