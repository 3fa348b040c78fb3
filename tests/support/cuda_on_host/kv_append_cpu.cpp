// The CUDA side of kv_append in the place of its CPU side, for tests.
#include <cstdio>
#include <cstdlib>

#include "../../../csrc/kv_append.cu"

namespace gptneo_fast {

void append_cpu(const Append& a, int64_t begin, int64_t) {
  if (begin != 0) return;  // one launch for all heads
  if (const char* fault = append_cuda(a, nullptr)) {
    std::fprintf(stderr, "launch failed: %s\n", fault);
    std::abort();
  }
}

}  // namespace gptneo_fast
