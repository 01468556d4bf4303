#include "gemm/sm100/grouped_gemm.cuh"

namespace megamoe::sm100 {

const GemmKernel l1_wide = GroupedGemm<Wide, float>::entry();

}  // namespace megamoe::sm100
