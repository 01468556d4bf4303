// The tiles that csrc's scheduler hands out, on the host.
#include "gemm/sm90/schedule.cuh"

#include <vector>

namespace sm90 = megamoe::sm90;

namespace {

template <typename Cut>
int walk(const int* offsets, int experts, int slabs, int blocks, int* parts, int room) {
  std::vector<int> first_tiles(experts + 1);
  for (int e = 0; e < experts; ++e) {
    first_tiles[e + 1] = first_tiles[e] + sm90::token_tiles<Cut>(offsets[e + 1] - offsets[e]);
  }
  int total = 0;
  for (int block = 0; block < blocks; ++block) {
    sm90::Walk<Cut> walk(offsets, first_tiles.data(), experts, slabs, block, blocks);
    for (int tile = 0; walk.valid(); walk.advance(), ++tile) {
      const sm90::Part first = walk.first();
      for (const sm90::Part& part : {first, walk.second(first)}) {
        if (part.slabs == 0) continue;
        if (total == room) return -1;
        const int row[] = {block,      tile,      part.expert, part.first_row, part.end_row,
                           part.width, part.slab, part.slabs};
        for (int i = 0; i < 8; ++i) parts[8 * total + i] = row[i];
        ++total;
      }
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
