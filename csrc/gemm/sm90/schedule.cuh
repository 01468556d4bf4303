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

constexpr int kMaxTokens = 176;     // of a token tile: two times 88 accumulators a thread
constexpr int kWeightRows = 256;    // of a weight tile: two warpgroups of 128 rows
constexpr int kSlabRows = 128;      // of one warpgroup

MEGAMOE_HD int ceil_div(int a, int b) { return (a + b - 1) / b; }

MEGAMOE_HD int token_tiles(int rows) { return ceil_div(rows, kMaxTokens); }

// Width of an expert's token tiles: 8, or a multiple of 16.
MEGAMOE_HD int tile_width(int rows) {
  const int tiles = token_tiles(rows);
  const int least = tiles ? ceil_div(rows, tiles) : 0;
  return least <= 8 ? 8 : ceil_div(least, 16) * 16;
}

struct Tile {
  int expert;
  int first_row;    // of the token tile
  int end_row;      // of the expert's rows
  int width;        // tokens, end_row or not
  int weight_tile;
};

// Walks through one block's tiles. offsets[L + 1] are the experts' first rows, first_tiles[L + 1]
// the sums of their token tiles.
class Walk {
 public:
  MEGAMOE_HD Walk(const int* offsets, const int* first_tiles, int experts, int weight_tiles,
                  int block)
      : offsets_(offsets), first_tiles_(first_tiles), experts_(experts),
        weight_tiles_(weight_tiles), next_(block) {}

  MEGAMOE_HD bool next(int blocks, Tile& tile) {
    while (expert_ < experts_ && next_ >= first_tiles_[expert_ + 1] * weight_tiles_) ++expert_;
    if (expert_ == experts_) return false;
    const int tiles = first_tiles_[expert_ + 1] - first_tiles_[expert_];
    const int index = next_ - first_tiles_[expert_] * weight_tiles_;
    const int first = offsets_[expert_];
    tile.expert = expert_;
    tile.end_row = offsets_[expert_ + 1];
    tile.width = tile_width(tile.end_row - first);
    tile.weight_tile = index / tiles;
    tile.first_row = first + index % tiles * tile.width;
    next_ += blocks;
    return true;
  }

 private:
  const int* offsets_;
  const int* first_tiles_;
  int experts_;
  int weight_tiles_;
  int next_;
  int expert_ = 0;
};

}  // namespace megamoe::sm90
