// kv_append on CUDA: one launch whose grid covers the tokens that are stored, however large the cache is.
#include <cuda_runtime.h>

#include "kv_append.h"

namespace gptneo_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kMany = 4;             // rows a thread copies where there is work for all SMs; its loads are independent
constexpr int64_t kManyFrom = 4096;  // blocks of one row a thread: 31 for each of 132 SMs

// Rows of a batch entry are numbered h * count + i for token i of head h: neighbouring threads write neighbouring slots.
template <typename Granule, int ROWS>
__global__ void __launch_bounds__(kThreads) append_kernel(const __grid_constant__ Append a) {
  const int32_t b = blockIdx.y;
  const Heads& from = blockIdx.z ? a.v : a.k;
  const Heads& to = blockIdx.z ? a.v_cache : a.k_cache;
  const Span span = stored_span(a, b);
  const int32_t rows = a.H * span.count;
  const char* source = from.data + b * from.batch;
  char* target = to.data + b * to.batch;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y * ROWS + threadIdx.y;
  for (int32_t g = threadIdx.x; g < a.granules; g += blockDim.x) {
    Granule value[ROWS];
    char* place[ROWS];
#pragma unroll
    for (int u = 0; u < ROWS; ++u) {
      const int64_t row = first + u * blockDim.y;
      place[u] = nullptr;
      if (row >= rows) continue;
      const int32_t h = static_cast<int32_t>(row) / span.count, i = static_cast<int32_t>(row) - h * span.count;
      const int64_t slot = slot_after(span.slot, i, a.R), column = span.column + i;
      value[u] = *reinterpret_cast<const Granule*>(source + h * from.head + column * from.token + g * from.granule);
      place[u] = target + h * to.head + slot * to.token + g * to.granule;
    }
#pragma unroll
    for (int u = 0; u < ROWS; ++u) {
      if (place[u]) *reinterpret_cast<Granule*>(place[u]) = value[u];
    }
  }
}

template <typename Granule>
void launch(const Append& a, cudaStream_t stream) {
  const int x = a.granules < kThreads ? a.granules : kThreads, y = kThreads / x;
  const int64_t rows = static_cast<int64_t>(a.H) * (a.T < a.R ? a.T : a.R);
  const int64_t blocks = (rows + y - 1) / y;
  const dim3 block(x, y);
  if (blocks * a.B * 2 < kManyFrom) {
    append_kernel<Granule, 1><<<dim3(static_cast<unsigned>(blocks), a.B, 2), block, 0, stream>>>(a);
  } else {
    const auto fewer = static_cast<unsigned>((blocks + kMany - 1) / kMany);
    append_kernel<Granule, kMany><<<dim3(fewer, a.B, 2), block, 0, stream>>>(a);
  }
}

const char* message(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

}  // namespace

const char* append_cuda(const Append& a, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  switch (a.width) {
    case 16: launch<uint4>(a, s); break;
    case 8: launch<uint2>(a, s); break;
    case 4: launch<uint32_t>(a, s); break;
    default: launch<uint16_t>(a, s); break;
  }
  return message(cudaGetLastError());
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
