// The op gptneo_fast_csrc::kv_append: checks, and the way to the CPU or the CUDA side. LibTorch's stable ABI only, so that
// one binary serves every torch from 2.11 on, with and without CUDA.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>

#include "kv_append.h"
#include "reading.h"

#ifdef GPTNEO_FAST_CUDA
#include <dlfcn.h>

#include <torch/csrc/stable/accelerator.h>
#endif

namespace gptneo_fast {
namespace {

constexpr int64_t kInt32Max = std::numeric_limits<int32_t>::max();
constexpr int64_t kMostTokens = 1 << 30;  // of all heads of a row: block indices stay below 2^31

// An argument that does not fit; gptneo_fast/ops/extension.py knows these by how they begin.
template <typename... Parts>
void check(bool holds, const Parts&... parts) {
  if (!holds) fail("kv_append: ", parts...);
}

bool same_place(const Tensor& x, const Tensor& y) {
  return x.is_cuda() == y.is_cuda() && x.is_cpu() == y.is_cpu() && x.get_device_index() == y.get_device_index();
}

void check_heads(const char* name, const Tensor& t, const Tensor& k_cache, int64_t tokens) {
  check(t.dim() == 4, name, " has shape ", sizes(t), ", but must have four axes [B, H, tokens, D]");
  const int64_t want[] = {k_cache.size(0), k_cache.size(1), tokens, k_cache.size(3)};
  for (int i = 0; i < 4; ++i) {
    check(t.size(i) == want[i], name, " has shape ", sizes(t), ", but axis ", i, " must be ", want[i], " (k_cache has shape ",
          sizes(k_cache), ")");
  }
  check(t.scalar_type() == k_cache.scalar_type(), name, " is ", torch::headeronly::toString(t.scalar_type()),
        ", but k_cache is ", torch::headeronly::toString(k_cache.scalar_type()), "; convert one of them");
  check(same_place(t, k_cache), name, " is on another device than k_cache; move one of them");
}

void check_written(const char* name, const Tensor& t) {
  for (int i = 0; i < 4; ++i) {
    check(t.size(i) <= 1 || t.stride(i) != 0, name, " is an expanded tensor (stride 0 of axis ", i,
          "), which cannot be written to; clone it");
  }
}

void check_counts(const char* name, const Tensor& t, const Tensor& k_cache) {
  check(t.dim() == 1 && t.size(0) == k_cache.size(0), name, " has shape ", sizes(t), ", but must be [", k_cache.size(0),
        "], one number for each row of k_cache");
  check(t.scalar_type() == ScalarType::Int, name, " is ", torch::headeronly::toString(t.scalar_type()),
        ", but must be int32; use .to(torch.int32)");
  check(same_place(t, k_cache), name, " is on another device than k_cache; move it");
}

void check_all(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k, const Tensor& v, const Tensor& lengths,
               const std::optional<Tensor>& starts) {
  check(k_cache.dim() == 4, "k_cache has shape ", sizes(k_cache), ", but must have four axes [B, H, slots, D]");
  const ScalarType dtype = k_cache.scalar_type();
  check(dtype == ScalarType::Half || dtype == ScalarType::BFloat16 || dtype == ScalarType::Float || dtype == ScalarType::Double,
        "k_cache is ", torch::headeronly::toString(dtype), ", but must be float16, bfloat16, float32 or float64");
  check(k.dim() == 4, "k has shape ", sizes(k), ", but must have four axes [B, H, T, D]");
  const int64_t R = k_cache.size(2), T = k.size(2);
  check_heads("v_cache", v_cache, k_cache, R);
  check_heads("k", k, k_cache, T);
  check_heads("v", v, k_cache, T);
  check_written("k_cache", k_cache);
  check_written("v_cache", v_cache);
  check_counts("lengths", lengths, k_cache);
  if (starts) check_counts("starts", *starts, k_cache);
  check(R > 0 || k.numel() == 0, "k_cache has 0 slots; give it at least one to store tokens in");
  const int64_t B = k_cache.size(0), H = k_cache.size(1);
  check(B <= 32767, "a batch of ", B, " rows exceeds 32767; split it");
  check(T <= kInt32Max && R <= kInt32Max && H <= kInt32Max && H * std::min(T, R) <= kMostTokens, "H x min(T, slots) = ", H,
        " x ", std::min(T, R), " exceeds ", kMostTokens, "; append in pieces");
}

Heads heads(const Tensor& t, bool written, int64_t size, int64_t width, bool dense) {
  void* data = written ? t.mutable_data_ptr() : const_cast<void*>(t.const_data_ptr());
  return {static_cast<char*>(data), t.stride(0) * size, t.stride(1) * size, t.stride(2) * size,
          dense ? width : t.stride(3) * size};
}

bool dense_rows(const Tensor& t) { return t.stride(3) == 1 || t.size(3) == 1; }

// Every bit that must be zero for vectors of a width: of addresses and of strides over axes with more than one entry.
uint64_t address_bits(const Tensor& t, int64_t size) {
  auto bits = reinterpret_cast<uint64_t>(t.const_data_ptr());
  for (int i = 0; i < 3; ++i) {
    if (t.size(i) > 1) bits |= static_cast<uint64_t>(t.stride(i) * size);
  }
  return bits;
}

Append describe(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k, const Tensor& v, const Tensor& lengths,
                const std::optional<Tensor>& starts) {
  const auto size = static_cast<int64_t>(k.element_size()), row = k.size(3) * size;
  const bool dense = dense_rows(k_cache) && dense_rows(v_cache) && dense_rows(k) && dense_rows(v);
  const uint64_t bits = address_bits(k_cache, size) | address_bits(v_cache, size) | address_bits(k, size) |
                        address_bits(v, size) | static_cast<uint64_t>(row);
  int64_t width = size;
  while (dense && width < 16 && bits % (2 * width) == 0) width *= 2;
  Append a{};
  a.k = heads(k, false, size, width, dense);
  a.v = heads(v, false, size, width, dense);
  a.k_cache = heads(k_cache, true, size, width, dense);
  a.v_cache = heads(v_cache, true, size, width, dense);
  a.lengths = static_cast<const int32_t*>(lengths.const_data_ptr());
  a.lengths_stride = lengths.stride(0);
  a.starts = starts ? static_cast<const int32_t*>(starts->const_data_ptr()) : nullptr;
  a.starts_stride = starts ? starts->stride(0) : 0;
  a.B = static_cast<int32_t>(k.size(0));
  a.H = static_cast<int32_t>(k.size(1));
  a.T = static_cast<int32_t>(k.size(2));
  a.R = static_cast<int32_t>(k_cache.size(2));
  a.granules = static_cast<int32_t>(row / width);
  a.width = static_cast<int32_t>(width);
  return a;
}

// On CUDA these values stay on the device; a row that is out of range is left alone there (slots.h).
void check_values(const Append& a) {
  for (int32_t b = 0; b < a.B; ++b) {
    const int64_t length = a.lengths[b * a.lengths_stride], start = a.starts ? a.starts[b * a.starts_stride] : 0;
    check(length >= 0 && length <= kInt32Max - a.T, "lengths[", b, "] is ", length, ", but must be from 0 to ",
          kInt32Max - a.T);
    check(start >= 0, "starts[", b, "] is ", start, ", but must be 0 or more");
  }
}

void kv_append_cpu(Tensor k_cache, Tensor v_cache, Tensor k, Tensor v, Tensor lengths, std::optional<Tensor> starts) {
  check_all(k_cache, v_cache, k, v, lengths, starts);
  if (k.numel() == 0) return;
  Append a = describe(k_cache, v_cache, k, v, lengths, starts);
  check_values(a);
  const int64_t bytes = static_cast<int64_t>(std::min(a.T, a.R)) * a.granules * a.width;
  const int64_t grain = std::max<int64_t>(1, 65536 / bytes);  // heads of a task: starting a thread costs microseconds
  const auto run = [](int64_t begin, int64_t end, void* call) { append_cpu(*static_cast<const Append*>(call), begin, end); };
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, static_cast<int64_t>(a.B) * a.H, grain, run, &a));
}

#ifdef GPTNEO_FAST_CUDA
// torch's current stream, asked for by name: this library is linked without libtorch_cuda and loads where there is none.
void* current_stream(int32_t device) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);  // RTLD_DEFAULT would not find it
    return library ? reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  if (!get) throw std::runtime_error("kv_append on CUDA: libtorch_cuda.so with torch's current stream is not loaded");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return stream;
}

void kv_append_cuda(Tensor k_cache, Tensor v_cache, Tensor k, Tensor v, Tensor lengths, std::optional<Tensor> starts) {
  check_all(k_cache, v_cache, k, v, lengths, starts);
  if (k.numel() == 0) return;
  const int32_t device = k_cache.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const CurrentDevice current(device);
  const char* fault = current.fault();
  if (!fault) fault = append_cuda(describe(k_cache, v_cache, k, v, lengths, starts), current_stream(device));
  if (fault) throw std::runtime_error("kv_append on cuda:" + std::to_string(device) + ": " + fault);
}

std::string fault_of(int64_t device) {
  const char* fault = cuda_fault(static_cast<int32_t>(device));
  return fault ? fault : "";
}

bool has_cuda() { return true; }
#else
std::string fault_of(int64_t) { return "the extension was built without CUDA"; }

bool has_cuda() { return false; }
#endif

}  // namespace
}  // namespace gptneo_fast

STABLE_TORCH_LIBRARY(gptneo_fast_csrc, m) {
  m.def(
      "kv_append(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor lengths, Tensor? starts=None) -> ()");
  m.def("cuda_fault(int device) -> str");
  m.def("has_cuda() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(gptneo_fast_csrc, CPU, m) { m.impl("kv_append", TORCH_BOX(&gptneo_fast::kv_append_cpu)); }

STABLE_TORCH_LIBRARY_IMPL(gptneo_fast_csrc, CompositeExplicitAutograd, m) {
  m.impl("cuda_fault", TORCH_BOX(&gptneo_fast::fault_of));
  m.impl("has_cuda", TORCH_BOX(&gptneo_fast::has_cuda));
}

#ifdef GPTNEO_FAST_CUDA
STABLE_TORCH_LIBRARY_IMPL(gptneo_fast_csrc, CUDA, m) { m.impl("kv_append", TORCH_BOX(&gptneo_fast::kv_append_cuda)); }
#endif
