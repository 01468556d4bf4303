// csrc/dependent_launch.cuh for the host: kernels run one after another.
#pragma once

#include <bitset>

#include "host_cuda.h"

namespace megamoe {

inline std::bitset<host_cuda::kMostThreads> waited;  // threads
inline void wait_for_previous_kernel() { waited.set(threadIdx.x); }
inline void let_next_kernel_start() {}

}  // namespace megamoe
