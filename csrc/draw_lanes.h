// What draw_cpu.cpp does for every token of a vocabulary. A part of decode_lanes.cpp, as lanes.h is.
#pragma once

#include "lanes.h"

namespace gptneo_fast {
namespace {

INLINE bool any(Ints where) {
  uint64_t words[kLanes / 2], all = 0;
  memcpy(words, &where, sizeof(where));
  for (const uint64_t word : words) all |= word;
  return all != 0;
}

// Places of the numbers of x [n] from `least` up, in ascending order; how many they are.
int64_t at_least(const float* x, int64_t n, float least, int32_t* places) {
  int64_t found = 0, i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const Ints hits = (load<kLanes>(x + i) >= least) | (load<kLanes>(x + i + kLanes) >= least);
    if (!any(hits)) continue;
    for (int l = 0; l < 2 * kLanes; ++l) {
      places[found] = static_cast<int32_t>(i + l);
      found += x[i + l] >= least;
    }
  }
  for (; i < n; ++i)
    if (x[i] >= least) places[found++] = static_cast<int32_t>(i);
  return found;
}

// y = e^(x - less)
void exponentials(const float* x, int64_t n, float less, float* y) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) write(y + i, exponential(load<kLanes>(x + i) - less));
  if (i == n) return;
  float part[kLanes] = {};
  memcpy(part, x + i, (n - i) * sizeof(float));
  write(part, exponential(load<kLanes>(part) - less));
  memcpy(y + i, part, (n - i) * sizeof(float));
}

constexpr int kState = 624, kShift = 397;

INLINE uint32_t twisted(uint32_t u, uint32_t v) {
  return (((u & 0x80000000u) | (v & 0x7fffffffu)) >> 1) ^ (-(v & 1) & 0x9908b0dfu);
}

// The next 624 words of MT19937, in place.
void twist(uint32_t* words) {
  for (int i = 0; i < kState - kShift; ++i) words[i] = words[i + kShift] ^ twisted(words[i], words[i + 1]);
  for (int i = kState - kShift; i < kState - 1; ++i) words[i] = words[i + kShift - kState] ^ twisted(words[i], words[i + 1]);
  words[kState - 1] = words[kShift - 1] ^ twisted(words[kState - 1], words[0]);
}

INLINE int32_t leading_bits(uint32_t y) {  // of the number that a word begins, tempered
  y ^= y >> 11;
  y ^= (y << 7) & 0x9d2c5680u;
  y ^= (y << 15) & 0xefc60000u;
  return static_cast<int32_t>((y ^ (y >> 18)) & 0x1fffffu);
}

// Places of the weights [n] that are at least bound * u, ascending; u is the number from 0 up to 1 of two words each, or a
// little less.
int64_t hopeful(const float* weights, const uint32_t* words, int64_t n, float bound, int32_t* places) {
  constexpr int64_t kChunk = 16;
  const float scale = bound * 0x1p-21f;
  const auto hits = [&](int64_t i) INLINE_LAMBDA {
    return weights[i] >= scale * static_cast<float>(leading_bits(words[2 * i]));
  };
  int64_t found = 0, i = 0;
  for (; i + kChunk <= n; i += kChunk) {
    int32_t some = 0;
    for (int64_t c = 0; c < kChunk; ++c) some |= hits(i + c);
    if (!some) continue;
    for (int64_t c = 0; c < kChunk; ++c)
      if (hits(i + c)) places[found++] = static_cast<int32_t>(i + c);
  }
  for (; i < n; ++i)
    if (hits(i)) places[found++] = static_cast<int32_t>(i);
  return found;
}

}  // namespace
}  // namespace gptneo_fast
