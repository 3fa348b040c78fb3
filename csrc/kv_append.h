// One call of kv_append in plain data, free of torch: what the CPU and the CUDA side take.
#pragma once

#include <cstdint>

#include "slots.h"

namespace gptneo_fast {

// A [B, H, tokens or slots, D] tensor; strides in bytes. The last axis is cut into granules of `Append::width` bytes.
struct Heads {
  char* data;
  int64_t batch, head, token, granule;
};

struct Append {
  Heads k, v;              // [B, H, T, D], read
  Heads k_cache, v_cache;  // [B, H, R, D], written
  const int32_t* lengths;  // [B], tokens held before the call
  const int32_t* starts;   // [B], columns of left padding, or null for none
  int64_t lengths_stride, starts_stride;  // in elements
  int32_t B, H, T, R;
  int32_t granules;  // of one row of D elements
  int32_t width;     // bytes of a granule: 16, 8, 4 or 2
};

GPTNEO_HOST_DEVICE Span stored_span(const Append& a, int32_t b) {
  return stored_span(a.lengths[b * a.lengths_stride], a.starts ? a.starts[b * a.starts_stride] : 0, a.T, a.R);
}

// Heads `begin` to `end` of the B * H in all.
void append_cpu(const Append& a, int64_t begin, int64_t end);

#ifdef GPTNEO_FAST_CUDA
// One launch on `stream`; a message, or null where it was launched.
const char* append_cuda(const Append& a, void* stream);

// Why the kernels cannot run on a device (its architecture, the driver), or null where they can.
const char* cuda_fault(int32_t device);

// Makes a device current for this library's own CUDA runtime, and puts the former one back.
class CurrentDevice {
 public:
  explicit CurrentDevice(int32_t device);
  ~CurrentDevice();
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;
  const char* fault() const { return fault_; }

 private:
  int former_ = -1;
  const char* fault_ = nullptr;
};
#endif

}  // namespace gptneo_fast
