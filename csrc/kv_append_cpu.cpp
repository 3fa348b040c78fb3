// kv_append on the CPU: the same slots as on CUDA, one copy per stored token of a head.
#include <cstring>

#include "kv_append.h"

namespace gptneo_fast {
namespace {

// `bytes` is a compile-time width, so that the copy is one load and one store.
template <int width>
void copy_granules(char* to, int64_t to_step, const char* from, int64_t from_step, int32_t granules) {
  for (int32_t g = 0; g < granules; ++g) std::memcpy(to + g * to_step, from + g * from_step, width);
}

using Copy = void (*)(char*, int64_t, const char*, int64_t, int32_t);

Copy copy_of(int32_t width) {
  switch (width) {
    case 16: return copy_granules<16>;
    case 8: return copy_granules<8>;
    case 4: return copy_granules<4>;
    default: return copy_granules<2>;
  }
}

void append_head(const Heads& cache, const Heads& from, const Append& a, const Span& span, int32_t b, int32_t h) {
  const Copy copy = copy_of(a.width);
  const char* source = from.data + b * from.batch + h * from.head;
  char* target = cache.data + b * cache.batch + h * cache.head;
  for (int32_t i = 0; i < span.count; ++i) {
    const int64_t slot = slot_after(span.slot, i, a.R), column = span.column + i;
    copy(target + slot * cache.token, cache.granule, source + column * from.token, from.granule, a.granules);
  }
}

}  // namespace

void append_cpu(const Append& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const auto b = static_cast<int32_t>(i / a.H), h = static_cast<int32_t>(i % a.H);
    const Span span = stored_span(a, b);
    append_head(a.k_cache, a.k, a, span, b, h);
    append_head(a.v_cache, a.v, a, span, b, h);
  }
}

}  // namespace gptneo_fast
