// Functions that run on the GPU and, in tests, on the host.
#pragma once

#ifdef __CUDACC__
#define MEGAMOE_HD __host__ __device__ __forceinline__
#define MEGAMOE_ROLLED _Pragma("unroll 1")  // of a loop: instructions that run once take long to fetch
#else
#define MEGAMOE_HD inline
#define MEGAMOE_ROLLED
#endif
