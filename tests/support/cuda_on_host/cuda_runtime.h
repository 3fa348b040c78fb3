// As much of CUDA as csrc/kv_append.cu needs to be compiled by a C++ compiler: a launch runs its threads one after the
// other. That is true to kernels whose threads neither meet nor share memory, and puts their addresses, their alignment
// and their grid under the eyes of AddressSanitizer and UBSan where there is no GPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <tuple>

#define __global__
#define __grid_constant__
#define __launch_bounds__(threads)

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline thread_local dim3 gridDim, blockDim, blockIdx, threadIdx;

enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
using cudaStream_t = void*;
struct cudaFuncAttributes {};

inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  return cudaSuccess;
}

// The limits of a device of capability 8.0 or 9.0.
inline bool launchable(const dim3& grid, const dim3& block) {
  const bool all = grid.x && grid.y && grid.z && block.x && block.y && block.z;
  return all && grid.x <= 2147483647u && grid.y <= 65535 && grid.z <= 65535 && block.x * block.y * block.z <= 1024;
}

template <typename Argument>
cudaError_t cudaLaunchKernel(void (*kernel)(Argument), dim3 grid, dim3 block, void** arguments, size_t, cudaStream_t) {
  if (!launchable(grid, block)) return cudaErrorInvalidConfiguration;
  gridDim = grid;
  blockDim = block;
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x)
        for (threadIdx.z = 0; threadIdx.z < block.z; ++threadIdx.z)
          for (threadIdx.y = 0; threadIdx.y < block.y; ++threadIdx.y)
            for (threadIdx.x = 0; threadIdx.x < block.x; ++threadIdx.x) kernel(*static_cast<Argument*>(arguments[0]));
  return cudaSuccess;
}
