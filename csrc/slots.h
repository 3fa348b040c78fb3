// Where new tokens go in a cache: the arithmetic that host and device share. Letters as in gptneo_fast/ops/reference.py.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define GPTNEO_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define GPTNEO_HOST_DEVICE inline
#endif

namespace gptneo_fast {

// The columns of one row that are stored: `count` of them from `column` on, the first one in slot `slot`.
struct Span {
  int32_t column, slot, count;
};

// Token t lives in slot t mod R, and column i of a row is token `length + i - start`. Columns before `start` are padding;
// columns before T - R would be overwritten by later ones of the same call. A negative length or start has no meaning and
// stores nothing, so that no value in device memory can lead outside the cache.
GPTNEO_HOST_DEVICE Span stored_span(int32_t length, int32_t start, int32_t T, int32_t R) {
  if (length < 0 || start < 0 || start >= T) return {0, 0, 0};
  const int32_t column = start > T - R ? start : T - R;
  const uint32_t token = static_cast<uint32_t>(length) + static_cast<uint32_t>(column - start);  // both < 2^31
  return {column, static_cast<int32_t>(token % static_cast<uint32_t>(R)), T - column};
}

// The slot `i` tokens after the one in `slot`, 0 <= i < R.
GPTNEO_HOST_DEVICE int32_t slot_after(int32_t slot, int32_t i, int32_t R) {
  const int32_t back = slot - (R - i);  // slot + i could overflow
  return back < 0 ? back + R : back;
}

}  // namespace gptneo_fast
