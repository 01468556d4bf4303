// What do wgmma and the other instructions of an SM take from one another?
//
//   nvcc -std=c++20 -O3 --expt-relaxed-constexpr -gencode=arch=compute_90a,code=sm_90a -Icsrc \
//     -I$(python -c "import importlib.util as u; \
//        print(u.find_spec('cutlass_library').submodule_search_locations[0])")/source/include \
//     benchmarks/wgmma_beside.cu -o /tmp/wgmma_beside && /tmp/wgmma_beside
//
// One block on one SM: two warpgroups that issue nothing but wgmma (m64nNk16, weights from registers,
// four to a group, one group ahead) and two that issue nothing but one mixture of instructions. Each
// pair is timed alone and beside the other, which then runs for forty times as long. A line a case:
// cycles that a wgmma takes, and cycles of a scheduler for each other instruction.
#include <cuda_bf16.h>

#include <cstdio>
#include <cstdlib>

#include "gemm/sm90/mma.cuh"

namespace {

using namespace megamoe::sm90;

constexpr int kWarpgroup = 128;
constexpr int kGroups = 400;     // of four wgmma
constexpr int kRepeats = 200;    // of 64 instructions
constexpr int kLonger = 40;

enum class Kind { kLop, kHmul, kImad, kLopHmul, kLopImad, kHmulImad };

extern __shared__ __align__(1024) uint8_t shared_memory[];

__device__ long long cycles() {
  long long c;
  asm volatile("mov.u64 %0, %%clock64;" : "=l"(c)::"memory");
  return c;
}

template <int N>
__device__ void multiply(int groups, uint32_t seed, long long* took, int* never) {
  float acc[N / 2] = {};
  uint32_t a[4][4];
  for (int i = 0; i < 16; ++i) a[i / 4][i % 4] = seed * (threadIdx.x + i);
  const uint32_t tokens =
      token_descriptor(static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory)));
  const long long start = cycles();
  for (int group = 0; group < groups; ++group) {
    cute::warpgroup_arrive();
#pragma unroll
    for (int i = 0; i < 4; ++i) multiply_add<N>(acc, a[i], tokens + 2 * i);
    cute::warpgroup_commit_batch();
    cute::warpgroup_wait<1>();
  }
  cute::warpgroup_wait<0>();
  pin(acc);
  const long long end = cycles();
  if (threadIdx.x % kWarpgroup == 0) took[threadIdx.x / kWarpgroup] = end - start;
  float sum = 0;
  for (float x : acc) sum += x;
  if (sum == 12345.0f) *never = 1;
}

template <Kind kind>
__device__ void others(int repeats, uint32_t seed, long long* took, int* never) {
  uint32_t r[16];
  for (int i = 0; i < 16; ++i) r[i] = threadIdx.x * seed + i;
  const uint32_t m = seed * 77;
  const auto lop = [](uint32_t& x) {
    asm volatile("lop3.b32 %0, %0, 0x12345678, %0, 0x3C;" : "+r"(x));
  };
  const auto hmul = [m](uint32_t& x) { asm volatile("mul.rn.bf16x2 %0, %0, %1;" : "+r"(x) : "r"(m)); };
  const auto imad = [m](uint32_t& x) { asm volatile("mul.lo.u32 %0, %0, %1;" : "+r"(x) : "r"(m)); };
  const long long start = cycles();
#pragma unroll 1
  for (int repeat = 0; repeat < repeats; ++repeat) {
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      uint32_t& x = r[i % 16];
      if constexpr (kind == Kind::kLop) lop(x);
      if constexpr (kind == Kind::kHmul) hmul(x);
      if constexpr (kind == Kind::kImad) imad(x);
      if constexpr (kind == Kind::kLopHmul) i % 2 ? lop(x) : hmul(x);
      if constexpr (kind == Kind::kLopImad) i % 2 ? lop(x) : imad(x);
      if constexpr (kind == Kind::kHmulImad) i % 2 ? hmul(x) : imad(x);
    }
  }
  const long long end = cycles();
  if (threadIdx.x % kWarpgroup == 0) took[threadIdx.x / kWarpgroup] = end - start;
  uint32_t all = 0;
  for (uint32_t x : r) all ^= x;
  if (all == 0x1234567) *never = 1;
}

template <int N, Kind kind>
__global__ void __launch_bounds__(4 * kWarpgroup, 1)
    both(int groups, int repeats, uint32_t seed, long long* took, int* never) {
  __syncthreads();
  if (threadIdx.x / kWarpgroup < 2) {
    multiply<N>(groups, seed, took, never);
  } else {
    others<kind>(repeats, seed, took, never);
  }
}

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
  std::exit(1);
}

template <int N, Kind kind>
void measure(const char* name, long long* took, int* never) {
  const auto kernel = both<N, kind>;
  constexpr int kShared = 64 << 10;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
  const auto run = [&](int groups, int repeats, int warpgroup) {
    kernel<<<1, 4 * kWarpgroup, kShared>>>(groups, repeats, 3, took, never);
    check(cudaGetLastError());
    check(cudaDeviceSynchronize());
    return static_cast<double>(took[warpgroup]);
  };
  // Two warpgroups share the tensor cores, and two warps a scheduler.
  const double wgmma = 2 * 4.0 * kGroups, other = 2 * 64.0 * kRepeats;
  std::printf("n = %3d beside %-10s a wgmma takes %6.1f cycles alone, %6.1f beside it; an instruction "
              "%5.2f alone, %5.2f beside wgmma\n",
              N, name, run(kGroups, 0, 0) / wgmma, run(kGroups, kLonger * kRepeats, 0) / wgmma,
              run(0, kRepeats, 2) / other, run(kLonger * kGroups, kRepeats, 2) / other);
}

template <int N>
void measure_all(long long* took, int* never) {
  measure<N, Kind::kLop>("LOP3", took, never);
  measure<N, Kind::kHmul>("HMUL2", took, never);
  measure<N, Kind::kImad>("IMAD", took, never);
  measure<N, Kind::kLopHmul>("LOP3+HMUL2", took, never);
  measure<N, Kind::kLopImad>("LOP3+IMAD", took, never);
  measure<N, Kind::kHmulImad>("HMUL2+IMAD", took, never);
}

}  // namespace

int main() {
  long long* took;
  int* never;
  check(cudaMallocHost(&took, 4 * sizeof(long long)));
  check(cudaMallocHost(&never, sizeof(int)));
  measure_all<16>(took, never);
  measure_all<32>(took, never);
  measure_all<128>(took, never);
}
