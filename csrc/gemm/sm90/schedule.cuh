// Which rows and which weights a block multiplies, from row counts that only the device knows.
//
// An expert's rows are cut into as few token tiles as there can be, all of one width; its weights
// into tiles of 256 rows. Tiles are numbered by expert, then weight tile, then token tile, so that
// blocks that run at the same time share weights while those are in L2. Block b takes tiles b,
// b + blocks, b + 2 * blocks ...
#pragma once

#include <cstdint>

#include "host_device.h"

namespace megamoe::sm90 {

constexpr int kTokenStep = 8;       // wgmma's widths are multiples of it
constexpr int kMaxTokens = 176;     // of a token tile: two times 88 accumulators a thread
constexpr int kWeightRows = 256;    // of a weight tile: two warpgroups of 128 rows
constexpr int kSlabRows = 128;      // of one warpgroup

MEGAMOE_HD int ceil_div(int a, int b) { return (a + b - 1) / b; }
MEGAMOE_HD int max_of(int a, int b) { return a > b ? a : b; }

MEGAMOE_HD int token_tiles(int rows) { return ceil_div(rows, kMaxTokens); }

// Width of an expert's token tiles: a multiple of kTokenStep.
MEGAMOE_HD int tile_width(int rows) {
  return ceil_div(rows, max_of(token_tiles(rows), 1) * kTokenStep) * kTokenStep;
}

// Rows that are loaded for a tile of this width: boxes have a multiple of 16.
MEGAMOE_HD int loaded_rows(int width) { return ceil_div(width, 16) * 16; }

struct Tile {
  int expert;
  int first_row;    // of the token tile
  int end_row;      // of the expert's rows
  int weight_tile;
};

// Walks through one block's tiles. offsets[L + 1] are the experts' first rows, first_tiles[L + 1]
// the sums of their token tiles. Little is kept, since it is kept in registers: what belongs to a
// tile is worked out when it is asked for.
class Walk {
 public:
  MEGAMOE_HD Walk(const int* offsets, const int* first_tiles, int experts, int weight_tiles,
                  int block)
      : offsets_(offsets), first_tiles_(first_tiles), experts_(experts),
        weight_tiles_(weight_tiles), index_(block) {}

  // Whether there is a tile here.
  MEGAMOE_HD bool valid() {
    while (expert_ < experts_ && index_ >= first_tiles_[expert_ + 1] * weight_tiles_) ++expert_;
    return expert_ < experts_;
  }

  MEGAMOE_HD void advance(int blocks) { index_ += blocks; }

  MEGAMOE_HD int width() const {
    return tile_width(offsets_[expert_ + 1] - offsets_[expert_]);
  }

  MEGAMOE_HD Tile tile() const {
    const int tiles = first_tiles_[expert_ + 1] - first_tiles_[expert_];
    const int index = index_ - first_tiles_[expert_] * weight_tiles_;
    return {expert_, offsets_[expert_] + index % tiles * width(), offsets_[expert_ + 1],
            index / tiles};
  }

 private:
  const int* offsets_;
  const int* first_tiles_;
  int experts_;
  int weight_tiles_;
  int index_;
  int expert_ = 0;
};

}  // namespace megamoe::sm90
