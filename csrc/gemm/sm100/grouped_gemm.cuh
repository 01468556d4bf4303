// The grouped block-scaled NVFP4 GEMM, put together from CUTLASS's collectives for SM100.
//
// One group is one expert: D [n, tokens] = alpha x (weights [n, k] x tokens [tokens, k]^T), all
// three as CUTLASS sees them, with the weights as operand A. D is M-major, which is a row of `n`
// outputs for each token. Tokens are the narrow operand, so a tile that few tokens fill wastes
// little: the tensor cores want 128 rows of A, and only 64 of B.
//
//   narrow   1 SM    128 x 64 tile     few tokens: every weight is read once, as fast as memory can
//   wide     2 SMs   256 x 256 tile    many tokens: each operand is read from L2 half as often
//
// Accumulators go from tensor memory through registers straight to device memory, a token's outputs
// side by side: no tensor map of D to change from expert to expert, and a fifth less memory to
// compile.
//
// How many tokens an expert has is read on the device: shapes, pointers and strides of every group
// come from the arrays that prepare.cuh writes.
// Floor: bytes of weights over memory bandwidth, or 2 n k tokens over the rate of NVFP4 MMAs.
#pragma once

// Not the headers that bring in every architecture's collectives: compiling takes 4 GB as it is.
#include "cutlass/cutlass.h"
#include "cutlass/device_kernel.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/collective/collective_epilogue.hpp"
#include "cutlass/epilogue/fusion/operations.hpp"
#include "cutlass/gemm/collective/collective_builder_decl.hpp"
#include "cutlass/gemm/collective/collective_mma_decl.hpp"
#include "cutlass/gemm/collective/sm100_blockscaled_mma_array_warpspecialized.hpp"
#include "cutlass/gemm/collective/builders/sm100_blockscaled_umma_builder.inl"
#include "cutlass/gemm/kernel/gemm_universal_decl.h"
#include "cutlass/gemm/kernel/tile_scheduler.hpp"
// after what it needs:
#include "cutlass/gemm/kernel/sm100_gemm_array_tma_warpspecialized.hpp"
#include "gemm/sm100/kernels.h"

namespace megamoe::sm100 {

struct Narrow {
  using Tile = cute::Shape<cute::_128, cute::_64, cute::_256>;
  using Cluster = cute::Shape<cute::_1, cute::_1, cute::_1>;
  using Mainloop = cutlass::gemm::KernelPtrArrayTmaWarpSpecialized1SmNvf4Sm100;
  using Epilogue = cutlass::epilogue::PtrArrayNoSmemWarpSpecialized1Sm;
};

struct Wide {
  using Tile = cute::Shape<cute::_256, cute::_256, cute::_256>;
  using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;
  using Mainloop = cutlass::gemm::KernelPtrArrayTmaWarpSpecialized2SmNvf4Sm100;
  using Epilogue = cutlass::epilogue::PtrArrayNoSmemWarpSpecialized2Sm;
};

// A direct-store epilogue that reads accumulators by another instruction than the builder's choice.
template <class Epilogue, class Load>
struct WithLoad;
template <class Policy, class Tile, class C, class StrideC, class D, class StrideD, class Fusion,
          class Old, class AlignC, class AlignD, class Load>
struct WithLoad<cutlass::epilogue::collective::CollectiveEpilogue<
                    Policy, Tile, C, StrideC, D, StrideD, Fusion, Old, AlignC, AlignD>,
                Load> {
  using Type = cutlass::epilogue::collective::CollectiveEpilogue<
      Policy, Tile, C, StrideC, D, StrideD, Fusion, Load, AlignC, AlignD>;
};

// Out: float or cutlass::bfloat16_t.
template <class Config, class Out>
struct GroupedGemm {
  using Operand = cutlass::nv_float4_t<cutlass::float_e2m1_t>;
  static constexpr int kAlignment = 32;  // elements of an operand in 16 bytes, as TMA wants
  static constexpr int kOutAlignment = 16 / sizeof(Out);
  using Linear = cutlass::epilogue::fusion::LinearCombination<Out, float, void, float>;

  using Built = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm100, cutlass::arch::OpClassBlockScaledTensorOp, typename Config::Tile,
      typename Config::Cluster, cutlass::epilogue::collective::EpilogueTileAuto, float, float, void,
      cutlass::layout::ColumnMajor*, kOutAlignment, Out, cutlass::layout::ColumnMajor*,
      kOutAlignment, typename Config::Epilogue, Linear>::CollectiveOp;
  // A lane reads one output of 64 tokens, so that a warp stores 32 neighbouring outputs at a time;
  // the builder's choice for 2-byte outputs suits stores through shared memory.
  using Epilogue = typename WithLoad<Built, cute::SM100_TMEM_LOAD_32dp32b64x>::Type;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm100, cutlass::arch::OpClassBlockScaledTensorOp, Operand,
      cutlass::layout::RowMajor*, kAlignment, Operand, cutlass::layout::ColumnMajor*, kAlignment,
      float, typename Config::Tile, typename Config::Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename Epilogue::SharedStorage))>,
      typename Config::Mainloop>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cutlass::gemm::GroupProblemShape<Problem>,
                                                      Mainloop, Epilogue>;
  using Arguments = typename Kernel::Arguments;

  static_assert(std::is_same_v<typename Kernel::InternalStrideA, WeightStride>);
  static_assert(std::is_same_v<typename Kernel::InternalStrideB, TokenStride>);
  static_assert(std::is_same_v<typename Kernel::InternalStrideD, OutStride>);
  static_assert(std::is_same_v<typename Mainloop::InternalLayoutSFA, ScaleLayout>);
  static_assert(std::is_same_v<typename Mainloop::InternalLayoutSFB, ScaleLayout>);

  static Arguments arguments(const KernelCall& call) {
    const Groups& groups = call.groups;
    using Code = cutlass::float_e2m1_t;
    using Scale = cutlass::float_ue4m3_t;
    Arguments a{};
    a.mode = cutlass::gemm::GemmUniversalMode::kGrouped;
    a.problem_shape = {call.experts, groups.shapes, call.shapes};
    a.mainloop.ptr_A = reinterpret_cast<const Code**>(groups.weights);
    a.mainloop.dA = groups.weight_strides;
    a.mainloop.ptr_B = reinterpret_cast<const Code**>(groups.tokens);
    a.mainloop.dB = groups.token_strides;
    a.mainloop.ptr_SFA = reinterpret_cast<const Scale**>(groups.weight_scales);
    a.mainloop.layout_SFA = groups.weight_scale_layouts;
    a.mainloop.ptr_SFB = reinterpret_cast<const Scale**>(groups.token_scales);
    a.mainloop.layout_SFB = groups.token_scale_layouts;
    a.epilogue.ptr_D = reinterpret_cast<Out**>(groups.out);
    a.epilogue.dD = groups.out_strides;
    if (call.scaled) a.epilogue.thread.alpha_ptr_array = groups.alphas;
    a.hw_info.sm_count = call.sms;
    return a;
  }

  static bool can_implement(const KernelCall& call) {
    return Kernel::can_implement(arguments(call));
  }

  static int64_t workspace_bytes(const KernelCall& call) {
    return static_cast<int64_t>(Kernel::get_workspace_size(arguments(call)));
  }

  static cudaError_t launch(const KernelCall& call, void* workspace, cudaStream_t stream) {
    const auto params = Kernel::to_underlying_arguments(arguments(call), workspace);
    const auto kernel = cutlass::device_kernel<Kernel>;
    const cudaError_t error = cudaFuncSetAttribute(
        reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
        Kernel::SharedStorageSize);
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {cute::size<0>(typename Config::Cluster{}), 1, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = Kernel::get_grid_shape(params);
    config.blockDim = Kernel::get_block_shape();
    config.dynamicSmemBytes = Kernel::SharedStorageSize;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, params);
  }

  static constexpr GemmKernel entry() { return {can_implement, workspace_bytes, launch}; }
};

}  // namespace megamoe::sm100
