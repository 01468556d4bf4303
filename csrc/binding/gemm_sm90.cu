// The two grouped GEMMs of a layer on Hopper as functions of the library: they launch, and wait for
// nothing. Tensors have been checked by megamoe_ep/kernels/cuda.py; addresses come as integers.
#include "binding/common.cuh"
#include "gemm/sm90/gemm.cuh"

namespace megamoe::sm90 {
namespace {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                           cudaEnableDefault, &result),
          "cudaGetDriverEntryPointByVersion(cuTensorMapEncodeTiled)");
    return reinterpret_cast<EncodeTiled>(found);
  }();
  return function;
}

// Boxes of `rows` rows and one k64 block out of bf16 [all_rows, k]; what lies outside reads as zero.
CUtensorMap map_tokens(int64_t tokens, int64_t all_rows, int64_t k, int rows) {
  CUtensorMap map;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(k), static_cast<cuuint64_t>(all_rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(2 * k)};
  const cuuint32_t box[2] = {kBlockK, static_cast<cuuint32_t>(rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult result = encode_tiled()(
      &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, reinterpret_cast<void*>(tokens), sizes, strides,
      box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    TVM_FFI_THROW(RuntimeError) << "cuTensorMapEncodeTiled: error " << result << " for " << all_rows
                                << " rows of " << k;
  }
  return map;
}

int num_sms(int device) {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
  return count;
}

template <typename Cut>
void launch(const Problem& problem, int64_t tokens, int64_t all_rows, int device, int64_t stream) {
  const CurrentDevice current(device);
  TokenMaps<Cut> maps;
  int rows = 0;
  for (CUtensorMap& map : maps.of_width) {
    map = map_tokens(tokens, all_rows, problem.k, rows += kTokenStep);
  }
  const auto kernel = grouped_gemm<Cut>;
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
        "grouped_gemm's shared memory");
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(num_sms(device)));
  config.blockDim = dim3(kThreads<Cut>);
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, problem, maps), "grouped_gemm");
}

template <typename T>
T* at(int64_t address) {
  return reinterpret_cast<T*>(address);
}

// rows bf16 [R, H], row_scales fp32 [R], offsets int32 [L + 1], weights packed with n = 2I and k = H,
// alpha fp32 [L, 2], input_scale fp32 [L] or 0, clamp or infinity, out bf16 [R, I]. `few` cuts for few
// rows an expert, else for many: any number is right with both.
void gemm_sm90_l1(int64_t rows, int64_t row_scales, int64_t offsets, int64_t weights, int64_t alpha,
                  int64_t input_scale, double clamp, int64_t out, int64_t all_rows,
                  int64_t experts, int64_t n, int64_t k, bool few, int64_t device, int64_t stream) {
  const Problem problem = {
      at<const uint8_t>(weights),
      at<const int32_t>(offsets),
      {true, at<__nv_bfloat16>(out), n / 2, nullptr, at<const float>(row_scales),
       at<const float>(alpha), at<const float>(input_scale), static_cast<float>(clamp)},
      static_cast<int>(experts),
      static_cast<int>(n),
      static_cast<int>(k),
  };
  (few ? launch<Few> : launch<Many>)(problem, rows, all_rows, static_cast<int>(device), stream);
}

// h bf16 [R, I], offsets int32 [L + 1], weights packed with n = H and k = I, alpha fp32 [L],
// out bf16 [R, H]; or homes int64 [R], or null: the address that each row goes to instead.
void gemm_sm90_l2(int64_t h, int64_t offsets, int64_t weights, int64_t alpha, int64_t out,
                  int64_t homes, int64_t all_rows, int64_t experts, int64_t n, int64_t k, bool few,
                  int64_t device, int64_t stream) {
  const Problem problem = {
      at<const uint8_t>(weights),
      at<const int32_t>(offsets),
      {false, at<__nv_bfloat16>(out), n, at<const int64_t>(homes), nullptr, at<const float>(alpha),
       nullptr, 0},
      static_cast<int>(experts),
      static_cast<int>(n),
      static_cast<int>(k),
  };
  (few ? launch<Few> : launch<Many>)(problem, h, all_rows, static_cast<int>(device), stream);
}

}  // namespace
}  // namespace megamoe::sm90

TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_sm90_l1, megamoe::sm90::gemm_sm90_l1);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_sm90_l2, megamoe::sm90::gemm_sm90_l2);
