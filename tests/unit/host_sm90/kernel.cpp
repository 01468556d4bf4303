// csrc's Hopper GEMM, whole, on the host.
#include "host_cuda.h"

#include <utility>

#include "gemm/sm90/gemm.cuh"

namespace megamoe::sm90 {

alignas(1024) uint8_t shared_memory[kSharedBytes];

template <typename Cut>
void run(const Problem& p, const uint16_t* rows, int64_t all_rows, int blocks) {
  TokenMaps<Cut> maps;
  int height = 0;
  for (CUtensorMap& map : maps.of_width) map = {rows, all_rows, p.k, height += kTokenStep};
  // A block that never does could end, and let what follows begin, before the kernel ahead has.
  const auto expect_wait = [] { expect(waited.any(), "did not wait for the kernel ahead"); };
  host_cuda::before_block = [&](int block) {
    if (block > 0) expect_wait();
    waited.reset();
    forget();
  };
  host_cuda::launch(blocks, kThreads<Cut>, reinterpret_cast<int*>(shared_memory),
                    kSharedBytes, kSharedBytes,
                    [&] { grouped_gemm<Cut>(p, maps); });
  expect_wait();
  host_cuda::before_block = [](int) {};
  expect(copies.empty(), "copies are still on their way");
}

}  // namespace megamoe::sm90

using namespace megamoe::sm90;

// As gemm_sm90_l1 and gemm_sm90_l2 of the library, with row_scales for L1 alone, by so many blocks; one
// producer warp may be slow.
extern "C" void grouped_gemm_on_host(
    bool gated, bool few, int blocks, unsigned seed, int slow_producer, const uint16_t* rows,
    const float* row_scales, const int32_t* offsets, const uint8_t* weights, const float* alpha,
    const float* input_scale, float clamp, __nv_bfloat16* out, const int64_t* homes, int64_t all_rows,
    int experts, int n, int k) {
  dice.seed(seed);
  pauses.seed(seed);
  slow_warp = slow_producer < 0 ? -1 : 4 * (few ? Few::kSlabs : Many::kSlabs) + slow_producer;
  const Problem problem = {
      weights, offsets,
      {gated, out, gated ? n / 2 : n, homes, row_scales, alpha, input_scale, clamp},
      experts, n, k,
  };
  (few ? run<Few> : run<Many>)(problem, rows, all_rows, blocks);
}

// Whether who waits for a barrier learns nothing; how often what a thread went by could not be known so far.
extern "C" int be_deaf(bool yes) {
  deaf = yes;
  return std::exchange(unknown, 0);
}
