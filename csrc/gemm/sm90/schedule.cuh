// Which rows and which weights a block multiplies, from row counts that only the device knows.
//
// An expert's rows are cut into as few token tiles as there can be, of one width or of two that are
// neighbours; its weights into slabs of 128 rows. A tile is as many slabs as a block has consumer
// warpgroups, or fewer, with their tokens.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace megamoe::sm90 {

constexpr int kSlabRows = 128;
constexpr int kTokenStep = 8;  // wgmma's widths are multiples of it

// Of numbers that are not negative, which takes fewer instructions.
MEGAMOE_HD constexpr int divide(int a, int b) {
  return static_cast<int>(static_cast<unsigned>(a) / static_cast<unsigned>(b));
}
MEGAMOE_HD constexpr int ceil_div(int a, int b) { return divide(a + b - 1, b); }
MEGAMOE_HD constexpr int min_of(int a, int b) { return a < b ? a : b; }

// How a GEMM is cut. Few rows an expert, and memory is the bound or nearly: every block has an equal share
// of all slabs, to one slab, and a share is of two experts, one with wide tiles and one with narrow ones,
// so that all take about as long. Many rows, and the tensor cores are the bound: tiles are numbered by
// expert, slabs and token tile, so that blocks that run at the same time share weights while those are in
// L2, and block b takes tiles b, b + blocks, b + 2 * blocks ... Those of the last round are split into
// slabs if there are blocks for all of these.
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

// Width of an expert's widest token tile: a multiple of kTokenStep.
template <typename Cut>
MEGAMOE_HD int tile_width(int rows) {
  if (rows <= Cut::kMaxTokens) return ceil_div(rows, kTokenStep) * kTokenStep;  // no division
  return ceil_div(rows, token_tiles<Cut>(rows) * kTokenStep) * kTokenStep;
}

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

// What Walk goes by.
struct Plan {
  const int* offsets;      // [L + 1]: the experts' first rows
  const int* first_tiles;  // sums of token tiles: of experts, [L + 1], or of pairs, [ceil(L / 2) + 1]
  const int* order;        // [L], for pairs: the experts, those with wide tiles first
};

// Experts are paired from both ends of their order.
MEGAMOE_HD constexpr int pairs_of(int experts) { return ceil_div(experts, 2); }

// Walks through one block's tiles.
template <typename Cut>
class Walk {
 public:
  MEGAMOE_HD Walk(const Plan& plan, int experts, int slabs, int block, int blocks)
      : plan_(plan), experts_(experts), slabs_(slabs) {
    if constexpr (Cut::kShares) {
      const int all = plan.first_tiles[pairs_of(experts)] * slabs;
      // The last blocks have the experts with the widest tiles, and take one less than the others.
      const int share = divide(all, blocks), more = all - share * blocks;
      const int fewer = blocks - more, nth = blocks - 1 - block;
      index_ = share * nth + (nth > fewer ? nth - fewer : 0);
      end_ = index_ + share + (nth >= fewer);
      const int most = share + (fewer < blocks);
      wide_run_ = min_of(most, ceil_div(most, 2 * Cut::kSlabs) * Cut::kSlabs);
      narrow_run_ = rows_of(plan.order[0]) > kAlike ? most - wide_run_ : 0;
    } else {
      const int all = plan.first_tiles[experts] * of_token_tile();
      const int last = all - divide(all, blocks) * blocks;
      index_ = block;
      end_ = blocks;
      lone_ = Cut::kSlabs * last <= blocks ? all - last : all;
    }
    MEGAMOE_ROLLED
    for (int above = places(); above - place_ > 1;) {
      const int middle = divide(place_ + above, 2);
      (whole() < plan.first_tiles[middle] * of_token_tile() ? above : place_) = middle;
    }
  }

  // Whether there is a tile here.
  MEGAMOE_HD bool valid() {
    if (Cut::kShares && index_ >= end_) return false;
    MEGAMOE_ROLLED
    while (place_ < places() && whole() >= plan_.first_tiles[place_ + 1] * of_token_tile()) ++place_;
    return place_ < places() && (Cut::kShares || index_ < lone_ || tile().first.slabs > 0);
  }

  MEGAMOE_HD Tile tile() const {
    if constexpr (Cut::kShares) {
      Tile tile = {};
      Walk at = *this;
      int room = end_ - index_;
      MEGAMOE_ROLLED
      for (bool second = false;; second = true) {
        const Run run = at.run_at(at.index_ - plan_.first_tiles[at.place_] * slabs_);
        int slabs = min_of(run.slabs, room);
        if (!second) {
          // As few tiles as there can be, and even: a lone slab takes longer than a quarter of four. Where
          // experts alternate, of this one's run, so that tiles of two experts are few.
          const int left = narrow_run_ > 0 ? slabs : room;
          const int even = ceil_div(left, ceil_div(left, Cut::kSlabs));
          slabs = min_of(slabs, even);
          room = left < Cut::kSlabs ? min_of(Cut::kSlabs, room) : even;
        }
        const Part part = part_of(run, slabs);
        (second ? tile.second : tile.first) = part;
        at.index_ += part.slabs;
        room -= part.slabs;
        if (second || part.slabs < slabs || room == 0 || !at.valid()) return tile;
      }
    } else {
      const int index = whole() - plan_.first_tiles[place_] * of_token_tile();
      const int tiles = plan_.first_tiles[place_ + 1] - plan_.first_tiles[place_];
      const int group = tiles == 1 ? index : divide(index, tiles);
      const bool lone = index_ >= lone_;
      const int slab = group * Cut::kSlabs + (lone ? (index_ - lone_) % Cut::kSlabs : 0);
      const int slabs = min_of(slabs_ - slab, lone ? 1 : Cut::kSlabs);
      return {part(place_, index - group * tiles, slab, slabs), {}};
    }
  }

  MEGAMOE_HD void advance(const Tile& tile) {
    index_ += Cut::kShares ? tile.first.slabs + tile.second.slabs : end_;
  }

 private:
  static constexpr int kAlike = 16;  // rows: tiles of so few take the same time

  // Slabs of one expert that follow one another, counted over its token tiles.
  struct Run {
    int expert;
    int begin;
    int slabs;
  };

  MEGAMOE_HD int rows_of(int expert) const {
    return plan_.offsets[expert + 1] - plan_.offsets[expert];
  }

  // From the pair's slab of this number on. Wide and narrow runs are in turn as long as there are both.
  MEGAMOE_HD Run run_at(int index) const {
    const int last = experts_ - 1 - place_;
    const int wide = plan_.order[place_], narrow = plan_.order[last];
    const int of_wide = token_tiles<Cut>(rows_of(wide)) * slabs_;
    const int of_narrow = last == place_ ? 0 : token_tiles<Cut>(rows_of(narrow)) * slabs_;
    const int both = wide_run_ + narrow_run_;
    int turns = 0, turn = 0;
    if (narrow_run_ > 0) {
      turns = min_of(divide(of_wide, wide_run_), divide(of_narrow, narrow_run_));
      turn = min_of(divide(index, both), turns);
    }
    const int wide_begin = turn * wide_run_, narrow_begin = turn * narrow_run_;
    const int wide_end = turn < turns ? wide_begin + wide_run_ : of_wide;
    const int narrow_end = turn < turns ? narrow_begin + narrow_run_ : of_narrow;
    const int at = index - turn * both;
    const int in_wide = wide_begin + at;
    if (in_wide < wide_end) return {wide, in_wide, wide_end - in_wide};
    const int in_narrow = narrow_begin + in_wide - wide_end;
    return {narrow, in_narrow, narrow_end - in_narrow};
  }

  // Of a run's first slabs, at most so many, what is of one token tile.
  MEGAMOE_HD Part part_of(const Run& run, int slabs) const {
    const int token_tile = run.begin < slabs_ ? 0 : divide(run.begin, slabs_);
    const int slab = run.begin - token_tile * slabs_;
    return part(run.expert, token_tile, slab, min_of(slabs, slabs_ - slab));
  }

  MEGAMOE_HD Part part(int expert, int token_tile, int slab, int slabs) const {
    const int begin = plan_.offsets[expert], end = plan_.offsets[expert + 1];
    const int steps = ceil_div(end - begin, kTokenStep);
    if (end - begin <= Cut::kMaxTokens) return {expert, begin, end, steps * kTokenStep, slab, slabs};
    const int tiles = token_tiles<Cut>(end - begin);
    const int least = divide(steps, tiles), wide = steps - least * tiles;  // tiles of a step more
    // The wide ones go round from slabs to slabs, or some blocks might have nothing else.
    const int turn = Cut::kShares ? 0 : divide(slab, Cut::kSlabs) % tiles;
    const auto wide_before = [&](int n) {
      return n < tiles ? min_of(n, wide) : wide + min_of(n - tiles, wide);
    };
    const int before = wide_before(turn + token_tile);
    const int row = begin + (token_tile * least + before - wide_before(turn)) * kTokenStep;
    const int width = (least + wide_before(turn + token_tile + 1) - before) * kTokenStep;
    return {expert, row, min_of(row + width, end), width, slab, slabs};
  }

  // The number of the tile, of which this may be but a slab.
  MEGAMOE_HD int whole() const {
    return Cut::kShares || index_ < lone_ ? index_ : lone_ + (index_ - lone_) / Cut::kSlabs;
  }

  MEGAMOE_HD int places() const { return Cut::kShares ? pairs_of(experts_) : experts_; }

  // Steps of the index that a token tile is worth.
  MEGAMOE_HD int of_token_tile() const {
    return Cut::kShares ? slabs_ : ceil_div(slabs_, Cut::kSlabs);
  }

  Plan plan_;
  int experts_;
  int slabs_;  // of an expert
  int index_;
  int end_;        // or how far it is to the next tile
  int place_ = 0;  // of the expert, or of the pair
  int lone_ = 0;  // of rounds: the first that is of one slab
  int wide_run_ = 0;
  int narrow_run_ = 0;  // 0: no turns
};

}  // namespace megamoe::sm90
