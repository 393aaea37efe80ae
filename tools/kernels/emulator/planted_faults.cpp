// Kernels with one fault each, to see that the emulation and the sanitizers notice; and some
// without.
#include <cstdio>
#include <string>
#include <vector>

#include "../../../csrc/cuda/portable.h"

namespace {

constexpr int kThreads = 64;

__global__ void divergent_barrier(float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
    out[threadIdx.x] = 1;
  } else {
    out[threadIdx.x] = 2;
    __syncthreads();
  }
}

__global__ void deadlock(float* out) {
  if (threadIdx.x < 16)
    __syncwarp();
  else
    __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void mask_of_absent_lanes(float* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(~0u, 1.f, 16);
}

__global__ void source_outside_the_mask(float* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(0xffffu, 1.f, 16);
}

__global__ void stale_shared(float* out) {
  FM_SHARED(float, shared, kThreads);
  if (threadIdx.x < 32) shared[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = shared[threadIdx.x];
}

__global__ void past_the_end(float* out) { out[threadIdx.x + 1] = 1; }

__global__ void past_shared(float* out) {
  FM_SHARED(float, shared, kThreads);
  float* const p = shared;
  p[threadIdx.x + 1] = 1;
  __syncthreads();
  out[threadIdx.x] = p[threadIdx.x];
}

struct alignas(16) Four {
  float v[4];
};
__global__ void misaligned(float* out) {
  reinterpret_cast<Four*>(out + 1)[threadIdx.x % 2] = {{1, 2, 3, 4}};
}

__global__ void shared_race(float* out) {
  FM_SHARED(float, shared, kThreads);
  shared[threadIdx.x] = float(threadIdx.x);
  out[threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
}

__global__ void block_race(float* out) { out[0] += 1; }

__global__ void missing_syncwarp(float* out) {
  FM_SHARED(float, shared, kThreads);
  shared[threadIdx.x] = 1;
  __shfl_xor_sync(~0u, 1.f, 1);
  out[threadIdx.x] = shared[threadIdx.x ^ 1];
}

__global__ void sound(float* out) {
  FM_SHARED(float, shared, kThreads);
  shared[threadIdx.x] = float(threadIdx.x);
  __syncthreads();
  const float v = shared[kThreads - 1 - threadIdx.x];
  __syncthreads();
  shared[threadIdx.x] = v;
  __syncwarp();
  out[threadIdx.x] = shared[threadIdx.x ^ 1] + __shfl_xor_sync(~0u, v, 1);
}

// The last block adds up what the others have left.
__global__ void sound_ticket(float* out) {
  if (threadIdx.x) return;
  unsigned* const count = reinterpret_cast<unsigned*>(out);
  out[2 + blockIdx.x] = 1 + float(blockIdx.x);
  __threadfence();
  if (atomicAdd(count, 1u) != gridDim.x - 1) return;
  float sum = 0;
  for (unsigned i = 0; i < gridDim.x; i++) sum += out[2 + i];
  out[1] = sum;
}

struct Case {
  const char* name;
  void (*kernel)(float*);
  int blocks;
};
#define CASE(kernel, blocks) {#kernel, kernel, blocks}
const Case cases[] = {
    CASE(divergent_barrier, 1),    CASE(deadlock, 1),
    CASE(mask_of_absent_lanes, 1), CASE(source_outside_the_mask, 1),
    CASE(stale_shared, 1),         CASE(past_the_end, 1),
    CASE(past_shared, 1),          CASE(misaligned, 1),
    CASE(shared_race, 1),          CASE(block_race, 2),
    CASE(missing_syncwarp, 1),     CASE(sound, 1),
    CASE(sound_ticket, 4),
};

}  // namespace

int main(int, char** arguments) {
  std::vector<float> out(kThreads, 0.f);
  float* const p = out.data();
  for (const Case& c : cases) {
    if (std::string(arguments[1]) != c.name) continue;
    try {
      FM_LAUNCH(c.kernel, c.blocks, kThreads, 0, nullptr, p);
    } catch (const std::exception& error) {
      std::printf("%s\n", error.what());
      return 2;
    }
    for (int i = 0; i < kThreads; i++)
      if (out[i] != out[i]) {
        std::printf("NaN at %d\n", i);
        return 3;
      }
    if (std::string(c.name) == "sound_ticket" && out[1] != 10.f) return 4;
    std::printf("nothing noticed\n");
    return 0;
  }
  return 5;
}
