// Which rows and which weights a block multiplies, from row counts that only the device knows.
//
// An expert's rows are cut into as few token tiles as there can be, all of one width; its weights into
// slabs of 128 rows. A tile is as many slabs as a block has consumer warpgroups, or fewer, with their
// tokens.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace megamoe::sm90 {

constexpr int kSlabRows = 128;
constexpr int kTokenStep = 8;  // wgmma's widths are multiples of it

MEGAMOE_HD constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
MEGAMOE_HD constexpr int min_of(int a, int b) { return a < b ? a : b; }

// How a GEMM is cut. Few rows an expert, and memory is the bound: the order is by expert, token tile and
// slab, and every block has an equal share of it, to a slab. A tile's slabs may be of two token tiles.
// Many rows, and the tensor cores are the bound:
// tiles are numbered by expert, slabs and token tile, so that blocks that run at the same time share
// weights while those are in L2, and block b takes tiles b, b + blocks, b + 2 * blocks ...
template <int slabs, int max_tokens, bool shares>
struct Cut {
  static constexpr int kSlabs = slabs;           // of a tile
  static constexpr int kMaxTokens = max_tokens;  // likewise
  static constexpr bool kShares = shares;
};
using Few = Cut<4, 48, true>;
using Many = Cut<2, 176, false>;

template <typename Cut>
MEGAMOE_HD int token_tiles(int rows) {
  return ceil_div(rows, Cut::kMaxTokens);
}

// Width of an expert's token tiles: a multiple of kTokenStep.
template <typename Cut>
MEGAMOE_HD int tile_width(int rows) {
  if (rows <= Cut::kMaxTokens) return ceil_div(rows, kTokenStep) * kTokenStep;  // no division
  return ceil_div(rows, token_tiles<Cut>(rows) * kTokenStep) * kTokenStep;
}

// Rows that are loaded for a tile of this width, in one box.
constexpr int kTokenBox = 16;
MEGAMOE_HD constexpr int loaded_rows(int width) { return ceil_div(width, kTokenBox) * kTokenBox; }

// Slabs of a tile that are of one token tile.
struct Part {
  int expert;
  int first_row;  // of the token tile
  int end_row;    // likewise
  int width;
  int slab;       // the first
  int slabs;
};

struct Tile {
  Part first;
  Part second;  // no slabs if the tile has but one part
};

// Walks through one block's tiles. offsets[L + 1] are the experts' first rows, first_tiles[L + 1]
// the sums of their token tiles. Little is kept, since it is kept in registers: what belongs to a
// tile is worked out when it is asked for.
template <typename Cut>
class Walk {
 public:
  MEGAMOE_HD Walk(const int* offsets, const int* first_tiles, int experts, int slabs, int block,
                  int blocks)
      : offsets_(offsets), first_tiles_(first_tiles), experts_(experts), slabs_(slabs) {
    if constexpr (Cut::kShares) {
      const int all = first_tiles[experts] * slabs;
      const int share = all / blocks, more = all % blocks;  // the first blocks take one more
      index_ = share * block + min_of(block, more);
      end_ = index_ + share + (block < more);
    } else {
      index_ = block;
      end_ = blocks;
    }
  }

  // Whether there is a tile here.
  MEGAMOE_HD bool valid() {
    if (Cut::kShares && index_ >= end_) return false;
    while (expert_ < experts_ && index_ >= first_tiles_[expert_ + 1] * of_token_tile()) ++expert_;
    return expert_ < experts_;
  }

  MEGAMOE_HD void advance() {
    if constexpr (Cut::kShares) {
      const Part part = first();
      index_ += part.slabs + second(part).slabs;
    } else {
      index_ += end_;
    }
  }

  MEGAMOE_HD Part first() const {
    const int before = first_tiles_[expert_];
    const int tiles = first_tiles_[expert_ + 1] - before;
    const int index = index_ - before * of_token_tile();
    int token_tile, slab, slabs;
    if constexpr (Cut::kShares) {
      token_tile = index < slabs_ ? 0 : index / slabs_;
      slab = index - token_tile * slabs_;
      slabs = min_of(next_slabs(), slabs_ - slab);
    } else {
      const int group = tiles == 1 ? index : index / tiles;
      token_tile = index - group * tiles;
      slab = group * Cut::kSlabs;
      slabs = slabs_ - slab;
    }
    const int end = offsets_[expert_ + 1];
    const int width = tile_width<Cut>(end - offsets_[expert_]);
    const int row = offsets_[expert_] + token_tile * width;
    return {expert_, row, min_of(row + width, end), width, slab, min_of(slabs, Cut::kSlabs)};
  }

  // What the tile has beside its first part; no slabs if nothing.
  MEGAMOE_HD Part second(const Part& first) const {
    if constexpr (Cut::kShares) {
      Walk rest = *this;
      rest.index_ += first.slabs;
      const int slabs = next_slabs() - first.slabs;
      if (slabs > 0 && rest.valid()) {
        Part part = rest.first();
        part.slabs = min_of(part.slabs, slabs);
        return part;
      }
    }
    return {};
  }

 private:
  // Of a share: slabs of its next tile. As few tiles as there can be, and even: a lone slab takes longer
  // than a quarter of four.
  MEGAMOE_HD int next_slabs() const {
    const int left = end_ - index_;
    return ceil_div(left, ceil_div(left, Cut::kSlabs));
  }

  // Steps of the index that a token tile is worth.
  MEGAMOE_HD int of_token_tile() const {
    return Cut::kShares ? slabs_ : ceil_div(slabs_, Cut::kSlabs);
  }

  const int* offsets_;
  const int* first_tiles_;
  int experts_;
  int slabs_;  // of an expert
  int index_;
  int end_;  // or how far it is to the next tile
  int expert_ = 0;
};

}  // namespace megamoe::sm90
