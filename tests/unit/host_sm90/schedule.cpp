// The tiles that csrc's scheduler hands out, on the host.
#include "gemm/sm90/schedule.cuh"

#include <algorithm>
#include <numeric>
#include <vector>

namespace sm90 = megamoe::sm90;

namespace {

template <typename Cut>
int walk(const int* offsets, int experts, int slabs, int blocks, int* parts, int room) {
  const auto rows = [&](int e) { return offsets[e + 1] - offsets[e]; };
  std::vector<int> order(experts), first_tiles(1);
  std::iota(order.begin(), order.end(), 0);
  if (Cut::kShares) {
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
      return sm90::tile_width<Cut>(rows(a)) > sm90::tile_width<Cut>(rows(b));
    });
  }
  for (int place = 0; place < (Cut::kShares ? sm90::pairs_of(experts) : experts); ++place) {
    const int other = experts - 1 - place;
    int tiles = sm90::token_tiles<Cut>(rows(order[place]));
    if (Cut::kShares && other != place) tiles += sm90::token_tiles<Cut>(rows(order[other]));
    first_tiles.push_back(first_tiles.back() + tiles);
  }
  int total = 0;
  for (int block = 0; block < blocks; ++block) {
    sm90::Walk<Cut> walk({offsets, first_tiles.data(), order.data()}, experts, slabs, block, blocks);
    for (int number = 0; walk.valid(); ++number) {
      const sm90::Tile tile = walk.tile();
      for (const sm90::Part& part : {tile.first, tile.second}) {
        if (part.slabs == 0) continue;
        if (total == room) return -1;
        const int row[] = {block,      number,    part.expert, part.first_row, part.end_row,
                           part.width, part.slab, part.slabs};
        for (int i = 0; i < 8; ++i) parts[8 * total + i] = row[i];
        ++total;
      }
      walk.advance(tile);
    }
  }
  return total;
}

}  // namespace

extern "C" int max_tokens(bool few) {
  return few ? sm90::Few::kMaxTokens : sm90::Many::kMaxTokens;
}

extern "C" int slabs_of_tile(bool few) { return few ? sm90::Few::kSlabs : sm90::Many::kSlabs; }

// The parts of all blocks' tiles, block by block, as (block, tile of the block, expert, first row, end
// row, width, slab, slabs). Returns how many there are, or -1 if there is no room for them.
extern "C" int walk(bool few, const int* offsets, int experts, int slabs, int blocks, int* parts,
                    int room) {
  return (few ? walk<sm90::Few> : walk<sm90::Many>)(offsets, experts, slabs, blocks, parts, room);
}
