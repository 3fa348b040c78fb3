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

// The scales of weights in few bits, in the order in which those are read.
struct Scales {
  const std::vector<Tensor>& all;
  size_t next;

  const Tensor& take(const char* name) {
    if (next == all.size()) refuse(name, " is in few bits, but has no scales");
    return all[next++];
  }
};

// Part `part` of the weights [rows, columns] of a product: floats, or words of few bits, whose scales say how many.
inline void read_weight(const Reader& read, Product& p, int part, const Tensor& t, Scales& scales, int64_t rows, int64_t columns,
                        const char* name) {
  p.outputs = rows, p.inputs = columns, p.parts = part + 1;
  if (t.scalar_type() != ScalarType::Int) {
    if (part > 0 && p.scales[0]) refuse(name, " is ", shape(t), ", but its neighbours are in few bits");
    p.weight[part] = read(t, rows, columns, name);
    return;
  }
  const Tensor& s = scales.take(name);
  const bool bytes = s.scalar_type() == ScalarType::Float, nibbles = s.scalar_type() == ScalarType::BFloat16;
  const int64_t packed = t.dim() == 2 ? t.size(1) * (nibbles ? 8 : 4) : 0, groups = s.dim() == 1 ? s.size(0) / rows : 0;
  const bool fits = t.dim() == 2 && t.size(0) == rows && packed >= columns && packed % 64 == 0 && t.is_contiguous() && t.is_cpu();
  const bool scaled = groups > 0 && s.size(0) == rows * groups && packed % groups == 0 && s.is_contiguous() && s.is_cpu();
  const int64_t group = scaled ? packed / groups : 0;
  const bool grouped = bytes ? groups == 1 : nibbles && (group == 32 || group == 64 || group == 128);
  if (!fits || !scaled || !grouped)
    refuse(name, " is ", shape(t), " with scales ", shape(s), ", but must be contiguous Int, words of ", rows, " rows of ",
           columns, " numbers in blocks of 64 on the CPU, with a scale a row or a group");
  const Number number = bytes ? Number::kInt8 : Number::kInt4;
  if (part > 0 && (p.number != number || p.groups != groups || p.row_blocks != packed / 64 || !p.scales[0]))
    refuse(name, " is in other bits than its neighbours");
  p.number = number, p.groups = groups, p.row_blocks = packed / 64;
  p.weight[part] = t.const_data_ptr(), p.scales[part] = s.const_data_ptr();
  if (!p.weight[part] || !p.scales[part]) refuse(name, " is ", shape(t), ", without its memory");
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

// Those with products of small integers only where there is no limit.
inline const Lanes& lanes_of(int64_t most) {
#if defined(__x86_64__)
  static const bool vnni = __builtin_cpu_supports("avx512vnni");
  const int64_t widest = lanes(most);
  if (widest == 16) return vnni && !most ? lanes_16_vnni : lanes_16;
  if (widest == 8) return lanes_8;
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
