// Tensors that an op was given: what is read of them, or in which words they are refused.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace gptneo_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// An error, in parts that are put together only here.
template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  ((text << parts), ...);
  throw std::runtime_error(text.str());
}

// An argument that the engine does not take; gptneo_fast/ops/cpu.py knows these by how they begin.
template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  fail("gptneo_fast_csrc: ", parts...);
}

inline std::string sizes(const Tensor& t) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  return text.str() + "]";
}

inline std::string shape(const Tensor& t) { return std::string(torch::headeronly::toString(t.scalar_type())) + " " + sizes(t); }

// Reads parameters of one dtype; of a block, or of none (-1).
struct Reader {
  ScalarType dtype;
  int64_t block;

  // The data of [rows, columns], or with `rows` 0 of [columns].
  const void* operator()(const Tensor& t, int64_t rows, int64_t columns, const char* name) const {
    const bool fits = rows ? t.dim() == 2 && t.size(0) == rows && t.size(1) == columns : t.dim() == 1 && t.size(0) == columns;
    if (fits && t.scalar_type() == dtype && t.is_contiguous() && t.is_cpu())
      if (const void* data = t.const_data_ptr()) return data;  // null where its storage was taken away
    const std::string where = block >= 0 ? "block " + std::to_string(block) + "'s " : "";
    const std::string size = (rows ? std::to_string(rows) + ", " : "") + std::to_string(columns);
    refuse(where, name, " is ", shape(t), ", but must be contiguous ", torch::headeronly::toString(dtype),
           " [", size, "] on the CPU, with its memory");
  }

  int64_t rows_of(const Tensor& t, const char* name) const {
    if (t.dim() != 2 || t.size(0) < 1) refuse(name, " is ", shape(t), ", but must have two axes");
    return t.size(0);
  }
};

inline const int64_t* numbers(const Tensor& t, int64_t B, int64_t T, bool one_row, int64_t limit, const char* name) {
  const bool rows = t.dim() == 2 && (t.size(0) == B || (one_row && t.size(0) == 1)) && t.size(1) == T;
  if (!(rows && t.scalar_type() == ScalarType::Long && t.is_contiguous() && t.is_cpu()))
    refuse(name, " is ", shape(t), ", but must be contiguous int64 [", B, ", ", T, "] on the CPU");
  const auto* p = static_cast<const int64_t*>(t.const_data_ptr());
  for (int64_t i = 0; i < t.numel(); ++i)
    if (p[i] < 0 || p[i] >= limit) refuse(name, " holds ", p[i], ", but must be from 0 to ", limit - 1);
  return p;
}

inline const int32_t* counts(const Tensor& t, int64_t B, const char* name) {
  if (!(t.dim() == 1 && t.size(0) == B && t.scalar_type() == ScalarType::Int && t.is_contiguous() && t.is_cpu()))
    refuse(name, " is ", shape(t), ", but must be contiguous int32 [", B, "] on the CPU");
  return static_cast<const int32_t*>(t.const_data_ptr());
}

}  // namespace gptneo_fast
