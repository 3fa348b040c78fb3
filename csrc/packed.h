// How weights in 8 and 4 bits lie on a CPU (gptneo_fast/ops/quantized.py has the words), as 16-bit numbers and as floats. A part
// of decode_lanes.cpp.
#pragma once

#include "decode.h"
#include "lanes.h"

namespace gptneo_fast {
namespace {

constexpr int64_t kTile = 16;       // rows whose words lie side by side
constexpr int64_t kBlock = 64;      // numbers of a row that whole words are made of; in 4 bits, 32 bytes
constexpr int64_t kHalfBlock = 32;  // numbers that share a scale whatever the format

typedef int16_t Shorts __attribute__((vector_size(4 * kLanes)));
typedef uint16_t UShorts __attribute__((vector_size(4 * kLanes)));

// Words of 4 numbers, in order.
struct Int8 {
  static constexpr int kWords = 16;  // of a block
  static constexpr int kPlaces = 2;  // vectors of pairs of numbers that a vector of words is
  static constexpr int kZero = 0, kZeroOfBytes = 128;  // what stands for no weight
  static constexpr bool kGrouped = false;  // a row has one scale, which its sum is multiplied by

  INLINE static Shorts pairs(Words words, int place) {
    const Shorts halves = same_bits<Shorts>(words);
    return place == 0 ? (halves << 8) >> 8 : halves >> 8;
  }
  // Which pair of a block of x, in `order`, pair `place` of word i is multiplied by.
  static constexpr int pair(int i, int place) { return 2 * i + place; }
  INLINE static void order(int16_t* x) {
    for (int k = 0; k < kBlock; k += 4) {
      const int16_t second = x[k + 1];
      x[k + 1] = x[k + 2], x[k + 2] = second;
    }
  }
  // The same as bytes without a sign, and x as its higher bytes [kBlock] and its lower ones, each with one.
  INLINE static Words bytes(Words words, int) { return words ^ 0x80808080; }
  INLINE static void split(int16_t* x) {
    typedef int16_t Block __attribute__((vector_size(2 * kBlock)));
    typedef int8_t Bytes __attribute__((vector_size(kBlock)));
    const Block block = read<Block>(x);
    const Bytes high = __builtin_convertvector((block + 128) >> 8, Bytes), low = __builtin_convertvector(block, Bytes);
    memcpy(x, &high, sizeof(high));
    memcpy(x + kBlock / 2, &low, sizeof(low));
  }
  // Of the kWords words of a row, numbers from i * 2 * kLanes on.
  INLINE static Shorts numbers(const uint32_t* words, int i) {
    const auto* p = reinterpret_cast<const int8_t*>(words) + i * 2 * kLanes;
#if defined(__AVX512BW__)
    return same_bits<Shorts>(_mm512_cvtepi8_epi16(read<__m256i>(p)));
#elif defined(__AVX2__)
    return same_bits<Shorts>(_mm256_cvtepi8_epi16(read<__m128i>(p)));
#else
    typedef int8_t Bytes __attribute__((vector_size(2 * kLanes)));
    return __builtin_convertvector(read<Bytes>(p), Shorts);
#endif
  }
};

// Halves of a word: half j of a block has numbers j, 16 + j, 32 + j and 48 + j, from its lowest bits up, each 8 too large.
struct Int4 {
  static constexpr int kWords = 8;
  static constexpr int kPlaces = 4;
  static constexpr int kZero = 8, kZeroOfBytes = 8;
  static constexpr bool kGrouped = true;

  INLINE static Shorts pairs(Words words, int place) { return same_bits<Shorts>(words >> (4 * place) & 0x000f000f); }
  static constexpr int pair(int i, int place) { return 8 * place + i; }
  INLINE static void order(int16_t*) {}
  INLINE static Words bytes(Words words, int place) { return words >> (4 * place) & 0x0f0f0f0f; }
  INLINE static void split(int16_t* x) {  // numbers i and 32 + i side by side
    typedef int16_t Half __attribute__((vector_size(kBlock)));
    const Half front = read<Half>(x), back = read<Half>(x + kBlock / 2);
    const Half high = (((front + 128) >> 8) & 255) | (((back + 128) >> 8) << 8), low = (front & 255) | (back << 8);
    memcpy(x, &high, sizeof(high));
    memcpy(x + kBlock / 2, &low, sizeof(low));
  }
  INLINE static Shorts numbers(const uint32_t* words, int i) {
    const auto* p = reinterpret_cast<const char*>(words);
#if GPTNEO_FAST_LANES == 16
    typedef uint16_t Words16 __attribute__((vector_size(32)));
    const Words16 half = read<Words16>(p);
    const struct {
      Words16 low, high;
    } twice = {half, half >> 4};
    const UShorts words16 = same_bits<UShorts>(twice);
    return same_bits<Shorts>(i == 0 ? words16 & 15 : (words16 >> 8) & 15);
#else
    constexpr int kParts = 8 / kLanes;  // vectors that the 16 halves are
    const UShorts halves = read<UShorts>(p + i % kParts * 4 * kLanes);
    return same_bits<Shorts>(halves >> (4 * (i / kParts)) & 15);
#endif
  }
};

// 16 rows of weights, fewer at the end.
struct Tile {
  const uint32_t* words;  // [words of a row, width]
  const void* scales;     // [groups, width]
  int64_t width;

  // The words [kWords, kTile] of a block: as they lie, or where there are fewer rows in `spare`.
  template <typename W>
  INLINE const uint32_t* block(int64_t b, uint32_t* spare) const {
    const uint32_t* own = words + b * W::kWords * width;
    return width == kTile ? own : copied(own, W::kWords, spare);
  }
  // What rows have once, [kTile], likewise.
  template <typename T>
  INLINE const T* rows(const T* own, T* spare) const {
    return width == kTile ? own : copied(own, 1, spare);
  }
  INLINE const BFloat16* scales_of(int64_t group, BFloat16* spare) const {
    return rows(static_cast<const BFloat16*>(scales) + group * width, spare);
  }

 private:
  template <typename T>
  const T* copied(const T* own, int64_t rows, T* spare) const {
    memset(spare, 0, rows * kTile * sizeof(T));
    for (int64_t i = 0; i < rows; ++i) memcpy(spare + i * kTile, own + i * width, width * sizeof(T));
    return spare;
  }
};

template <typename W>
Tile tile_of(const Product& p, int64_t part, int64_t tile) {
  const int64_t row = tile * kTile, words = p.row_blocks * W::kWords;
  const int64_t scales = W::kGrouped ? p.groups * sizeof(BFloat16) : sizeof(float);
  return {static_cast<const uint32_t*>(p.weight[part]) + row * words, static_cast<const char*>(p.scales[part]) + row * scales,
          p.outputs - row < kTile ? p.outputs - row : kTile};
}

INLINE Floats floats_of(const int16_t* p) {
#if defined(__AVX512F__)  // where gcc would convert eight at a time
  return same_bits<Floats>(_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(read<__m256i>(p))));
#elif defined(__AVX2__)
  return same_bits<Floats>(_mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(read<__m128i>(p))));
#else
  typedef int16_t Half __attribute__((vector_size(2 * kLanes)));
  return __builtin_convertvector(read<Half>(p), Floats);
#endif
}

// out[k] = number k of a row of weights in few bits.
template <typename W, typename T>
void dequantize_row(const Product& p, int64_t row, T* out) {
  const Tile tile = tile_of<W>(p, 0, row / kTile);
  const int64_t lane = row % kTile;
  const auto* scales = static_cast<const BFloat16*>(tile.scales) + lane;
  const float whole = W::kGrouped ? 0.0f : static_cast<const float*>(tile.scales)[lane];
  const int shift = p.groups < p.row_blocks ? 2 : p.groups == p.row_blocks ? 1 : 0;  // of groups of 128, 64 and 32
  constexpr int64_t kSome = 16;  // blocks whose words are brought together before vectors of them are read
  uint32_t words[kSome * W::kWords];
  for (int64_t first = 0; first < p.inputs; first += kBlock) {
    if (const int64_t b = first / kBlock; b % kSome == 0) {
      const uint32_t* from = tile.words + b * W::kWords * tile.width + lane;
      const int64_t count = W::kWords * (p.row_blocks - b < kSome ? p.row_blocks - b : kSome);
      for (int64_t i = 0; i < count; ++i) words[i] = from[i * tile.width];
    }
    int16_t integers[kBlock];
    UNROLL for (int i = 0; i < kBlock / (2 * kLanes); ++i) {
      const Shorts some = W::numbers(words + first / kBlock % kSome * W::kWords, i);
      memcpy(integers + i * 2 * kLanes, &some, sizeof(some));
    }
    float spare[kBlock];
    const int64_t left = p.inputs - first;
    UNROLL for (int64_t k = 0; k < kBlock; k += kLanes) {
      const float scale = W::kGrouped ? widen(scales[((first + k) / kHalfBlock >> shift) * tile.width]) : whole;
      const Floats value = (floats_of(integers + k) - static_cast<float>(W::kZero)) * scale;
      if (k + kLanes <= left) narrow(value, out + first + k);
      else write(spare + k, value);
    }
    if (left < kBlock) {
      const int64_t k = left / kLanes * kLanes;
      store(spare + k, out + first + k, left - k);
    }
  }
}

}  // namespace
}  // namespace gptneo_fast
