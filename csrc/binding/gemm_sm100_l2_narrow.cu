#include "gemm/sm100/grouped_gemm.cuh"

namespace megamoe::sm100 {

const GemmKernel l2_narrow = GroupedGemm<Narrow, cutlass::bfloat16_t>::entry();

}  // namespace megamoe::sm100
