// Memory of tensors that a decode step reads whole, in pages of 2 MB where the kernel gives them: fewer translations of addresses
// are missed then. Most weights are smaller than such a page and the C library notes a size before each, which takes the page
// that it is in from the kernel; so they come out of mappings of our own, one behind the other.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "reading.h"

namespace gptneo_fast {
namespace {

constexpr int64_t kPage = 2 << 20;      // bytes
constexpr int64_t kMapping = 32 << 20;  // of one at least: its memory lives as long as the last of its tensors
constexpr int64_t kAlign = 64;          // of a tensor, as torch has it

constexpr int64_t rounded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Pages that go back with the last tensor that has them.
struct Mapping {
  char *begin, *end;

  explicit Mapping(int64_t bytes) : begin(static_cast<char*>(std::aligned_alloc(kPage, bytes))), end(begin + bytes) {
    if (!begin) fail("no memory for ", bytes, " bytes of weights");
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    madvise(begin, bytes, MADV_HUGEPAGE);  // what it refuses stays as it is
#endif
  }
  ~Mapping() { std::free(begin); }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
};

// Tensors on the CPU, with no values yet, of the shapes and dtypes of these.
std::vector<Tensor> large_pages(const std::vector<Tensor>& like) {
  std::vector<int64_t> sizes;  // bytes
  for (const Tensor& t : like) sizes.push_back(rounded(t.numel() * static_cast<int64_t>(t.element_size()), kAlign));
  std::vector<Tensor> made;
  std::shared_ptr<Mapping> now;
  char* next = nullptr;
  for (size_t i = 0; i < like.size(); ++i) {
    if (!now || sizes[i] > now->end - next) {
      int64_t bytes = 0;  // of this one and those that fit beside it
      for (size_t j = i; j < like.size() && (j == i || bytes + sizes[j] <= kMapping); ++j) bytes += sizes[j];
      now = std::make_shared<Mapping>(std::max(kPage, rounded(bytes, kPage)));
      next = now->begin;
    }
    const std::vector<int64_t> shape(like[i].sizes().begin(), like[i].sizes().end());
    std::vector<int64_t> strides(shape.size(), 1);
    for (size_t axis = shape.size(); axis-- > 1;) strides[axis - 1] = strides[axis] * std::max<int64_t>(1, shape[axis]);
    const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
    made.push_back(torch::stable::from_blob(next, shape, strides, cpu, like[i].scalar_type(), [now](void*) {}));
    next += sizes[i];
  }
  return made;
}

STABLE_TORCH_LIBRARY_FRAGMENT(gptneo_fast_csrc, m) { m.def("large_pages(Tensor[] like) -> Tensor[]"); }
STABLE_TORCH_LIBRARY_IMPL(gptneo_fast_csrc, CompositeExplicitAutograd, m) { m.impl("large_pages", TORCH_BOX(&large_pages)); }

}  // namespace
}  // namespace gptneo_fast
