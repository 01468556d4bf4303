// Programmatic dependent launch: a kernel may begin while the one before it in the stream ends.
#pragma once

namespace megamoe {

// Everything that the kernel before this one in the stream has written can be read from here on.
__device__ __forceinline__ void wait_for_previous_kernel() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

// The next kernel's blocks may take what room is left on the SMs; they wait as above.
__device__ __forceinline__ void let_next_kernel_start() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

}  // namespace megamoe
