#include "gemm/sm100/grouped_gemm.cuh"

const megamoe::sm100::GemmKernel megamoe::sm100::l1_narrow = GroupedGemm<Narrow, float>::entry();
