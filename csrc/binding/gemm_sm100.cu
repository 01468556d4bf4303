// The two grouped GEMMs of a layer on Blackwell as functions of the library: they launch, and wait
// for nothing. Tensors have been checked by megamoe_ep/kernels/cuda_sm100.py; addresses come as
// integers. `layer_address` is that of a Layer in host memory.
#include <string>
#include <vector>

#include "binding/common.cuh"
#include "gemm/sm100/kernels.h"
#include "gemm/sm100/prepare.cuh"
#include "gemm/sm100/scratch.h"
#include "gemm/sm100/swiglu.cuh"

// What stays the same from call to call, all 64-bit integers; Python packs it by these names.
#define MEGAMOE_SM100_LAYER(X) \
  X(scratch) X(rows) X(experts) X(hidden) X(intermediate) X(wide) X(sms) X(device)

namespace megamoe::sm100 {
namespace {

using tvm::ffi::String;

constexpr int kBlocksPerSm = 8;
constexpr int64_t kSharedBytes = 48 * 1024;  // what a block has without asking

struct Layer {
#define MEGAMOE_FIELD(name) int64_t name;
  MEGAMOE_SM100_LAYER(MEGAMOE_FIELD)
#undef MEGAMOE_FIELD

  Sizes sizes() const {
    return {rows, static_cast<int>(experts), static_cast<int>(hidden),
            static_cast<int>(intermediate), static_cast<int>(sms)};
  }
};

template <typename T>
T* at(int64_t address) {
  return reinterpret_cast<T*>(address);
}

// Packs the rows, describes the groups, multiplies.
void multiply(const Layer& layer, const Scratch& scratch, const GroupedCall& call, int64_t rows,
              const GemmKernel& kernel, const char* name, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(layer.sms * kBlocksPerSm);
  prepare<<<blocks, kThreads, prepare_shared_bytes(call.experts), stream>>>(
      scratch.groups, call, at<const __nv_bfloat16>(rows));
  check(cudaGetLastError(), "prepare");
  const KernelCall gemm = {scratch.groups, call.experts, static_cast<int>(layer.sms),
                           call.alphas != nullptr, nullptr};
  check(kernel.launch(gemm, scratch.workspace, stream), name);
}

String gemm_sm100_fields() {
  std::string names;
#define MEGAMOE_NAME(name) names += (names.empty() ? "" : " ") + std::string(#name);
  MEGAMOE_SM100_LAYER(MEGAMOE_NAME)
#undef MEGAMOE_NAME
  return String(names);
}

// Bytes of scratch memory that a layer needs, once every kernel has said that it can do it. Needs
// no GPU.
int64_t gemm_sm100_scratch_bytes(int64_t rows, int64_t experts, int64_t hidden,
                                 int64_t intermediate, int64_t sms) {
  const Sizes sizes = {rows, static_cast<int>(experts), static_cast<int>(hidden),
                       static_cast<int>(intermediate), static_cast<int>(sms)};
  if (prepare_shared_bytes(sizes.experts) > kSharedBytes) {
    TVM_FFI_THROW(ValueError) << "the SM100 GEMMs take up to " << kSharedBytes / 8 - 1
                              << " experts on one rank; got " << experts << ".";
  }
  const Problem l1 = cute::make_shape(2 * sizes.intermediate, static_cast<int>(rows), sizes.hidden);
  const Problem l2 = cute::make_shape(sizes.hidden, static_cast<int>(rows), sizes.intermediate);
  for (const auto& [kernel, problem] :
       {std::pair{&l1_narrow, l1}, {&l1_wide, l1}, {&l2_narrow, l2}, {&l2_wide, l2}}) {
    const std::vector<Problem> shapes(experts, problem);
    const bool scaled = kernel == &l2_narrow || kernel == &l2_wide;
    const KernelCall call = {{}, sizes.experts, sizes.sms, scaled, shapes.data()};
    if (!kernel->can_implement(call)) {
      TVM_FFI_THROW(ValueError) << "CUTLASS's SM100 GEMM cannot do " << cute::get<0>(problem)
                                << " outputs of K = " << cute::get<2>(problem)
                                << "; both must be multiples of 32.";
    }
    const int64_t bytes = kernel->workspace_bytes(call);
    if (bytes > sms * kWorkspacePerSm) {
      TVM_FFI_THROW(RuntimeError) << "CUTLASS wants " << bytes << " bytes of workspace, more than "
                                  << sms * kWorkspacePerSm << ".";
    }
  }
  return lay_out_scratch(0, sizes).bytes;
}

// rows bf16 [R, H], row_scales fp32 [R], expert_offsets int32 [L + 1], codes and scales of w13 as
// megamoe_ep/prepack/sm100.py packs them, alpha fp32 [L, 2], input_scale fp32 [L], clamp or
// infinity, out bf16 [R, I].
void gemm_sm100_l1(int64_t layer_address, int64_t rows, int64_t row_scales, int64_t expert_offsets,
                   int64_t codes, int64_t scales, int64_t alpha, int64_t input_scale, double clamp,
                   int64_t out, int64_t stream_address) {
  const Layer& layer = *at<const Layer>(layer_address);
  const CurrentDevice current(static_cast<int>(layer.device));
  const cudaStream_t stream = at<CUstream_st>(stream_address);
  const Sizes sizes = layer.sizes();
  const Scratch scratch = lay_out_scratch(layer.scratch, sizes);
  const GroupedCall call = l1_call(scratch, sizes, at<const int32_t>(expert_offsets),
                                   at<const uint8_t>(codes), at<const uint8_t>(scales));
  multiply(layer, scratch, call, rows, layer.wide ? l1_wide : l1_narrow, "l1", stream);
  const SwigluCall activation = {
      sizes.experts, sizes.intermediate, call.expert_offsets, scratch.gate_up,
      at<const float>(row_scales), at<const float>(alpha), at<const float>(input_scale),
      static_cast<float>(clamp), at<__nv_bfloat16>(out),
  };
  const unsigned blocks = static_cast<unsigned>(layer.sms * kBlocksPerSm);
  swiglu_and_requantise<<<blocks, kThreads, prepare_shared_bytes(sizes.experts), stream>>>(
      activation);
  check(cudaGetLastError(), "swiglu_and_requantise");
}

// h bf16 [R, I], expert_offsets int32 [L + 1], codes and scales of w2, alpha fp32 [L], out bf16
// [R, H].
void gemm_sm100_l2(int64_t layer_address, int64_t h, int64_t expert_offsets, int64_t codes,
                   int64_t scales, int64_t alpha, int64_t out, int64_t stream_address) {
  const Layer& layer = *at<const Layer>(layer_address);
  const CurrentDevice current(static_cast<int>(layer.device));
  const Sizes sizes = layer.sizes();
  const Scratch scratch = lay_out_scratch(layer.scratch, sizes);
  const GroupedCall call =
      l2_call(scratch, sizes, at<const int32_t>(expert_offsets), at<const uint8_t>(codes),
              at<const uint8_t>(scales), at<const float>(alpha), at<char>(out));
  multiply(layer, scratch, call, h, layer.wide ? l2_wide : l2_narrow, "l2",
           at<CUstream_st>(stream_address));
}

}  // namespace
}  // namespace megamoe::sm100

TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_sm100_fields, megamoe::sm100::gemm_sm100_fields);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_sm100_scratch_bytes, megamoe::sm100::gemm_sm100_scratch_bytes);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_sm100_l1, megamoe::sm100::gemm_sm100_l1);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_sm100_l2, megamoe::sm100::gemm_sm100_l2);
