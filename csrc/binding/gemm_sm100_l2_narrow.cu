#include "gemm/sm100/grouped_gemm.cuh"

const megamoe::sm100::GemmKernel megamoe::sm100::l2_narrow = GroupedGemm<Narrow, cutlass::bfloat16_t>::entry();
