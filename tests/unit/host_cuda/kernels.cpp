// The kernels of csrc/comm as functions of a host library, one call a launch.
#include "comm/combine.cuh"
#include "comm/dispatch.cuh"
#include "comm/stage.cuh"

namespace megamoe::comm {

int shared[1 << 15];

template <typename Kernel>
void launch(const View& v, int64_t shared_bytes, Kernel&& kernel) {
  host_cuda::launch(static_cast<int>(v.blocks), kThreads, shared, shared_bytes, sizeof(shared),
                    kernel);
}

}  // namespace megamoe::comm

using namespace megamoe::comm;

extern "C" {

const char* comm_fields() {
#define MEGAMOE_NAME(name) #name " "
  return MEGAMOE_COMM_VIEW(MEGAMOE_NAME);
#undef MEGAMOE_NAME
}

int owner(int num_experts, int per_rank, int expert) {
  return Experts(num_experts, per_rank).owner(expert);
}

int sharing_log2(int received, int blocks) { return sharing_log2_of(received, blocks); }

uint64_t flag_step() { return kStep; }
uint64_t flag_last_step(uint64_t from, uint64_t to, int blocks) {
  return last_step(from, to, blocks);
}
uint64_t flag_before_steps(uint64_t flag) { return before_steps(flag); }

int64_t comm_num_latches() { return kLatches; }
int64_t comm_status_words() { return kStatusWords; }

void run_stage(const View* v, const char* x, const int32_t* topk_idx, const float* topk_weights,
               const float* global_scale, const int32_t* num_tokens, int32_t rows) {
  const StageArguments a = {x, topk_idx, topk_weights, global_scale, num_tokens, rows};
  launch(*v, stage_shared_bytes(), [=] { stage_tokens(*v, a); });
}

void run_send(const View* v, int with_weights) {
  launch(*v, send_shared_bytes(*v), [=] { dispatch_send(*v, with_weights); });
}

void run_expand(const View* v, int count_here, int sharing_log2, int by_lane, void* stats,
                int stats_bytes) {
  if (!count_here) launch(*v, count_shared_bytes(*v), [=] { dispatch_count(*v); });
  launch(*v, expand_shared_bytes(*v),
         [=] { dispatch_expand(*v, count_here, sharing_log2, by_lane, stats, stats_bytes); });
}

void run_send_home(const View* v, int exact) {
  launch(*v, combine_shared_bytes(*v), [=] { exact ? combine_send_rows(*v) : combine_send_sums(*v); });
}

void run_sum(const View* v, int exact, int raises, char* y, int y_rows) {
  launch(*v, combine_shared_bytes(*v), [=] {
    exact ? combine_sum<true>(*v, y, y_rows, raises) : combine_sum<false>(*v, y, y_rows, raises);
  });
}

// As run_sum, but rank 0's record of having given up on rank 1 comes in before block `block` begins.
void run_sum_given_up(const View* v, char* y, int y_rows, int block) {
  host_cuda::before_block = [=](int b) {
    const uint64_t record[kAbortWords] = {1, kCombine, 1, 0, 2, 0, 0, 0};
    if (b == block) memcpy(abort_record(*v, v->memory, 0), record, sizeof(record));
  };
  run_sum(v, 1, 0, y, y_rows);
  host_cuda::before_block = [](int) {};
}

void run_flag_rounds(uint64_t* there, const uint64_t* here, int first, int rounds, int timeout_us) {
  host_cuda::launch(1, 1, shared, 0, sizeof(shared),
                    [=] { flag_rounds(there, here, first, rounds, 1000ll * timeout_us); });
}
}
