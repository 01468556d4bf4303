// stage, dispatch and combine as functions of the library, and what measures their flags: they launch,
// and wait for nothing.
//
// Sizes, dtypes and devices of the tensors have been checked by megamoe_ep/moe.py; addresses come as
// integers. `view` is the address of a comm::View in host memory, copied into every launch.
#include <tvm/ffi/tvm_ffi.h>

#include <string>

#include "binding/common.cuh"
#include "comm/combine.cuh"
#include "comm/dispatch.cuh"
#include "comm/stage.cuh"

namespace megamoe::comm {
namespace {

using tvm::ffi::String;

// Up to this many entries, each block of dispatch_expand counts all of them: less than the time of
// one more kernel.
constexpr int64_t kCountHere = 4096;
static_assert(kCountHere < 1 << 16);  // Counts

// Launches on one stream of one GPU, each kernel allowed to begin while the one before it ends, and
// with more blocks where more have something to do.
class Launcher {
 public:
  Launcher(const View& v, int64_t stream)
      : device_(static_cast<int>(v.device)),
        current_(device_),
        view_(v),
        stream_(reinterpret_cast<cudaStream_t>(stream)) {}

  template <typename... Parameters, typename... Arguments>
  void run(const char* name, void (*kernel)(Parameters...), int64_t busy_blocks, int64_t shared_bytes,
           Arguments... arguments) const {
    const void* function = reinterpret_cast<const void*>(kernel);
    if (shared_bytes > 48 * 1024) {
      // The most, whatever this call needs: the limit is the function's, and threads launch at once.
      int most = 0;
      check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device_), name);
      check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, most), name);
    }
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks(busy_blocks)));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = stream_;
    config.attrs = &attribute;
    config.numAttrs = 1;
    check(cudaLaunchKernelEx(&config, kernel, arguments...), name);
  }

  int64_t blocks(int64_t busy) const {
    return busy > view_.blocks ? view_.most_blocks : view_.blocks;
  }

 private:
  int device_;
  CurrentDevice current_;
  const View& view_;
  cudaStream_t stream_;
};

const View& view_at(int64_t view) { return *reinterpret_cast<const View*>(view); }

String comm_fields() {
  std::string names;
#define MEGAMOE_NAME(name) names += (names.empty() ? "" : " ") + std::string(#name);
  MEGAMOE_COMM_VIEW(MEGAMOE_NAME)
#undef MEGAMOE_NAME
  return String(names);
}

int64_t comm_num_latches() { return kLatches; }
int64_t comm_status_words() { return kStatusWords; }

void comm_stage(int64_t view, int64_t x, int64_t topk_idx, int64_t topk_weights,
                int64_t global_scale, int64_t num_tokens, int64_t rows, int64_t stream) {
  const View& v = view_at(view);
  const StageArguments arguments = {
      View::local<const char>(x),
      View::local<const int32_t>(topk_idx),
      View::local<const float>(topk_weights),
      View::local<const float>(global_scale),
      View::local<const int32_t>(num_tokens),
      static_cast<int32_t>(rows),
  };
  Launcher(v, stream).run("stage_tokens", stage_tokens, rows, stage_shared_bytes(), v, arguments);
}

void comm_dispatch(int64_t view, bool with_weights, bool by_lane, int64_t stats,
                   int64_t stats_bytes, int64_t stream) {
  const View& v = view_at(view);
  const Launcher launcher(v, stream);
  const int64_t received = v.world_size * v.max_tokens;
  const bool count_here = received * v.top_k <= kCountHere;
  const int sharing_log2 = count_here ? sharing_log2_of(received, launcher.blocks(received)) : 0;
  launcher.run("dispatch_send", dispatch_send, v.max_tokens, send_shared_bytes(v), v,
               static_cast<int>(with_weights));
  if (!count_here) {
    launcher.run("dispatch_count", dispatch_count, received, count_shared_bytes(v), v);
  }
  launcher.run("dispatch_expand", dispatch_expand, received, expand_shared_bytes(v), v,
               static_cast<int>(count_here), sharing_log2, static_cast<int>(by_lane),
               View::local<void>(stats), static_cast<int>(stats_bytes));
}

void comm_combine(int64_t view, bool exact, bool rows_are_home, int64_t y, int64_t y_rows,
                  int64_t stream) {
  const View& v = view_at(view);
  const Launcher launcher(v, stream);
  const int64_t shared_bytes = combine_shared_bytes(v);
  const int rows = static_cast<int>(y_rows);
  const int parts = parts_of_sum(static_cast<int>(v.home_bytes()));
  const int64_t sum_blocks = blocks_for(rows, parts);
  if (exact) {
    if (!rows_are_home) {
      launcher.run("combine_send_rows", combine_send_rows, v.max_tokens, shared_bytes, v);
    }
    launcher.run("combine_sum", combine_sum<true>, sum_blocks, shared_bytes, v,
                 View::local<char>(y), rows, static_cast<int>(rows_are_home));
  } else {
    launcher.run("combine_send_sums", combine_send_sums,
                 blocks_for(v.world_size * v.max_tokens, parts), shared_bytes, v);
    launcher.run("combine_sum", combine_sum<false>, sum_blocks, shared_bytes, v,
                 View::local<char>(y), rows, 0);
  }
}

// Whether kernels on GPU `device` can add to the memory of GPU `peer`, as raising a flag does.
bool comm_adds_to_peer(int64_t device, int64_t peer) {
  int able = 0;
  check(cudaDeviceGetP2PAttribute(&able, cudaDevP2PAttrNativeAtomicSupported,
                                  static_cast<int>(device), static_cast<int>(peer)),
        "cudaDeviceGetP2PAttribute");
  return able != 0;
}

void comm_flag_rounds(int64_t there, int64_t here, int64_t first, int64_t rounds, int64_t timeout_ns,
                      int64_t device, int64_t stream) {
  const CurrentDevice current(static_cast<int>(device));
  flag_rounds<<<1, 1, 0, reinterpret_cast<cudaStream_t>(stream)>>>(
      View::local<uint64_t>(there), View::local<const uint64_t>(here),
      static_cast<uint64_t>(first), static_cast<int>(rounds), timeout_ns);
  check(cudaGetLastError(), "flag_rounds");
}

}  // namespace
}  // namespace megamoe::comm

TVM_FFI_DLL_EXPORT_TYPED_FUNC(comm_fields, megamoe::comm::comm_fields);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(comm_num_latches, megamoe::comm::comm_num_latches);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(comm_status_words, megamoe::comm::comm_status_words);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(comm_stage, megamoe::comm::comm_stage);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(comm_dispatch, megamoe::comm::comm_dispatch);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(comm_combine, megamoe::comm::comm_combine);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(comm_adds_to_peer, megamoe::comm::comm_adds_to_peer);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(comm_flag_rounds, megamoe::comm::comm_flag_rounds);
