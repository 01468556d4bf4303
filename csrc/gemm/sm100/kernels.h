// The compiled kernels, one translation unit each (csrc/binding/gemm_sm100_*.cu): a grouped GEMM
// takes CUTLASS minutes and gigabytes to compile.
#pragma once

#include <cuda_runtime.h>

#include "gemm/sm100/groups.h"

namespace megamoe::sm100 {

struct KernelCall {
  Groups groups;
  int experts;
  int sms;                // 1 block on each
  bool scaled;            // by groups.alphas
  const Problem* shapes;  // of all groups, in host memory, for can_implement; null for a launch
};

struct GemmKernel {
  bool (*can_implement)(const KernelCall&);
  int64_t (*workspace_bytes)(const KernelCall&);
  cudaError_t (*launch)(const KernelCall&, void* workspace, cudaStream_t);
};

// L1 leaves its accumulators in fp32, L2 its result in bf16; narrow and wide: see grouped_gemm.cuh.
extern const GemmKernel l1_narrow, l1_wide, l2_narrow, l2_wide;

}  // namespace megamoe::sm100
