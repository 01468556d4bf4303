// Functions that run on the GPU and, in tests, on the host.
#pragma once

#ifdef __CUDACC__
#define MEGAMOE_HD __host__ __device__ __forceinline__
#else
#define MEGAMOE_HD inline
#endif
