// How the ops of the CPU run: on which vectors, on which threads, in which memory.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "decode.h"
#include "reading.h"

namespace gptneo_fast {

inline Number number_of(ScalarType dtype) {
  if (dtype == ScalarType::Float) return Number::kFloat32;
  if (dtype == ScalarType::BFloat16) return Number::kBFloat16;
  if (dtype == ScalarType::Half) return Number::kFloat16;
  refuse("weights are ", torch::headeronly::toString(dtype), ", but must be float32, bfloat16 or float16");
}

inline void run_parallel(int64_t count, int64_t grain, void (*task)(int64_t, int64_t, void*), void* context) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, grain, task, context));
}

// Lanes of the widest vectors that this CPU has.
inline int64_t widest_lanes() {
#if defined(__x86_64__)
  unsigned eax, ebx, ecx = 0, edx;  // of F16C older compilers have no name
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
  if (!f16c || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 4;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return avx512 ? 16 : 8;
#else
  return 4;
#endif
}

// The same where `most` allows it; 0 for no limit.
inline int64_t lanes(int64_t most) {
  static const int64_t widest = widest_lanes();  // asked once: a virtual machine takes 10 us to answer
  return most ? std::min(widest, most) : widest;
}

inline const Lanes& lanes_of(int64_t lanes) {
#if defined(__x86_64__)
  if (lanes == 16) return lanes_16;
  if (lanes == 8) return lanes_8;
#endif
  return lanes_4;
}

// An arena of a thread: a step that made its own would fault its pages in anew each time.
inline float* workspace(int64_t floats) {
  thread_local std::vector<float> arena;
  if (static_cast<int64_t>(arena.size()) < floats + kPad) arena.resize(floats + kPad);
  const auto address = reinterpret_cast<uintptr_t>(arena.data());
  return reinterpret_cast<float*>((address + 63) / 64 * 64);
}

}  // namespace gptneo_fast
