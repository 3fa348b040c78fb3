// kv_append on CUDA: one launch whose grid covers the tokens that are stored, however large the cache is.
#include <cuda_runtime.h>

#include "kv_append.h"

namespace gptneo_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kMany = 4;           // tokens a thread copies where that leaves work for all SMs; its loads are independent
constexpr int64_t kManyFrom = 512;  // blocks of that kind: about 4 for each of 132 SMs

// threadIdx.x walks along the row of a token, threadIdx.y along tokens: neighbouring threads write neighbouring bytes.
// With one token a thread, tokens of all heads are numbered h * count + i, so that a step of one token fills its blocks;
// with more, blockIdx.y is the head, and no thread divides.
template <typename Granule, int TOKENS>
__global__ void __launch_bounds__(kThreads) append_kernel(const __grid_constant__ Append a) {
  const int32_t b = blockIdx.z >> 1;
  const Heads& from = blockIdx.z & 1 ? a.v : a.k;
  const Heads& to = blockIdx.z & 1 ? a.v_cache : a.k_cache;
  const Span span = stored_span(a, b);
  int32_t h = blockIdx.y, i = blockIdx.x * (blockDim.y * TOKENS) + threadIdx.y;
  if constexpr (TOKENS == 1) {
    if (i >= a.H * span.count) return;  // all of them where the span is empty
    h = i / span.count;
    i -= h * span.count;
  }
  const char* source = from.data + b * from.batch + h * from.head;
  char* target = to.data + b * to.batch + h * to.head;
  for (int32_t g = threadIdx.x; g < a.granules; g += blockDim.x) {
    Granule value[TOKENS];
#pragma unroll
    for (int u = 0; u < TOKENS; ++u) {
      const int32_t n = i + u * blockDim.y;
      if (n < span.count) {
        const int64_t column = span.column + n;
        value[u] = *reinterpret_cast<const Granule*>(source + column * from.token + g * from.granule);
      }
    }
#pragma unroll
    for (int u = 0; u < TOKENS; ++u) {
      const int32_t n = i + u * blockDim.y;
      if (n < span.count) {
        const int64_t slot = slot_after(span.slot, n, a.R);
        *reinterpret_cast<Granule*>(target + slot * to.token + g * to.granule) = value[u];
      }
    }
  }
}

template <typename Granule>
cudaError_t launch(const Append& a, cudaStream_t stream) {
  const int x = a.granules < kThreads ? a.granules : kThreads, y = kThreads / x;
  const int64_t tokens = a.T < a.R ? a.T : a.R;
  const auto blocks_of = [](int64_t rows, int64_t of) { return static_cast<unsigned>((rows + of - 1) / of); };
  const dim3 block(x, y), many(blocks_of(tokens, y * kMany), a.H, 2 * a.B), few(blocks_of(tokens * a.H, y), 1, 2 * a.B);
  void* arguments[] = {const_cast<Append*>(&a)};
  if (tokens >= y * kMany && a.H <= 65535 && static_cast<int64_t>(many.x) * many.y * many.z >= kManyFrom) {
    return cudaLaunchKernel(append_kernel<Granule, kMany>, many, block, arguments, 0, stream);
  }
  return cudaLaunchKernel(append_kernel<Granule, 1>, few, block, arguments, 0, stream);
}

const char* message(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

}  // namespace

const char* append_cuda(const Append& a, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  switch (a.width) {
    case 16: return message(launch<uint4>(a, s));
    case 8: return message(launch<uint2>(a, s));
    case 4: return message(launch<uint32_t>(a, s));
    default: return message(launch<uint16_t>(a, s));
  }
}

const char* cuda_fault(int32_t device) {
  const CurrentDevice current(device);
  if (current.fault()) return current.fault();
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, append_kernel<uint4, 1>);
  cudaGetLastError();  // a failed query must not be taken for a failed launch later
  return message(error);
}

CurrentDevice::CurrentDevice(int32_t device) {
  int now = -1;
  cudaError_t error = cudaGetDevice(&now);
  if (error == cudaSuccess && now != device) {
    error = cudaSetDevice(device);
    if (error == cudaSuccess) former_ = now;
  }
  fault_ = message(error);
  if (fault_) cudaGetLastError();
}

CurrentDevice::~CurrentDevice() {
  if (former_ >= 0) cudaSetDevice(former_);
}

}  // namespace gptneo_fast
