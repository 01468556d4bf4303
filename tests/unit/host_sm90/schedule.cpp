// The tiles that csrc's scheduler hands out, on the host.
#include "gemm/sm90/schedule.cuh"

#include <vector>

namespace sm90 = megamoe::sm90;

extern "C" int max_tokens() { return sm90::kMaxTokens; }

// The tiles of all blocks, block by block, as (expert, first_row, end_row, width, weight_tile), and
// how many each block has. Returns how many there are, or -1 if there is no room for them.
extern "C" int walk(const int* offsets, int experts, int weight_tiles, int blocks, int* counts,
                    int* tiles, int room) {
  std::vector<int> first_tiles(experts + 1);
  for (int e = 0; e < experts; ++e) {
    first_tiles[e + 1] = first_tiles[e] + sm90::token_tiles(offsets[e + 1] - offsets[e]);
  }
  int total = 0;
  for (int block = 0; block < blocks; ++block) {
    sm90::Walk walk(offsets, first_tiles.data(), experts, weight_tiles, block);
    counts[block] = 0;
    for (; walk.valid(); walk.advance(blocks), ++counts[block]) {
      if (total == room) return -1;
      const sm90::Tile tile = walk.tile();
      int* to = tiles + 5 * total++;
      to[0] = tile.expert;
      to[1] = tile.first_row;
      to[2] = tile.end_row;
      to[3] = walk.width();
      to[4] = tile.weight_tile;
    }
  }
  return total;
}
