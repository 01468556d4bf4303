#include "gemm/sm100/grouped_gemm.cuh"

namespace megamoe::sm100 {

const GemmKernel l1_narrow = GroupedGemm<Narrow, float>::entry();

}  // namespace megamoe::sm100
