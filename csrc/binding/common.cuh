// What the exported functions have in common.
#pragma once

#include <cuda_runtime.h>
#include <tvm/ffi/tvm_ffi.h>

namespace megamoe {

// An error of CUDA becomes Python's RuntimeError.
inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // an error of a launch must not show up again in somebody else's call
  TVM_FFI_THROW(RuntimeError) << what << ": " << cudaGetErrorString(error) << " ("
                              << cudaGetErrorName(error) << ")";
}

// Makes a GPU the current one until the end of the scope.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) : device_(device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device_ != before_) check(cudaSetDevice(device_), "cudaSetDevice");
  }
  ~CurrentDevice() {
    if (device_ != before_) cudaSetDevice(before_);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int device_;
  int before_ = 0;
};

}  // namespace megamoe
