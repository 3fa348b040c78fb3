// How weights in 8 and 4 bits lie (gptneo_fast/ops/quantized.py has the words), as 16-bit numbers and as floats. A part of
// decode_lanes.cpp.
#pragma once

#include "decode.h"
#include "lanes.h"

namespace gptneo_fast {
namespace {

constexpr int64_t kBlock = 64;      // numbers that lie together; in 4 bits, 32 bytes
constexpr int64_t kHalfBlock = 32;  // numbers that share a scale whatever the format
constexpr int kVectors = kBlock / (2 * kLanes);  // of 16-bit numbers in a block

typedef int16_t Shorts __attribute__((vector_size(4 * kLanes)));
typedef uint16_t UShorts __attribute__((vector_size(4 * kLanes)));

// Weights of a block as 16-bit numbers, in their order: vector i of them.
struct Int8 {
  static constexpr int64_t kBytes = kBlock;
  static constexpr float kZero = 0;        // what stands for no weight
  static constexpr bool kGrouped = false;  // a row has one scale, which its sum is multiplied by

  INLINE static Shorts unpack(const uint8_t* p, int i) {
    p += i * 2 * kLanes;
#if defined(__AVX512BW__)
    return same_bits<Shorts>(_mm512_cvtepi8_epi16(read<__m256i>(p)));
#elif defined(__AVX2__)
    return same_bits<Shorts>(_mm256_cvtepi8_epi16(read<__m128i>(p)));
#else
    typedef int8_t Bytes __attribute__((vector_size(2 * kLanes)));
    return __builtin_convertvector(read<Bytes>(p), Shorts);
#endif
  }
  static constexpr bool kSplits = false;
};

// 16 words of 4 numbers: word j has numbers j, 16 + j, 32 + j and 48 + j, from its lowest bits up, each 8 too large.
struct Int4 {
  static constexpr int64_t kBytes = kBlock / 2;
  static constexpr float kZero = 8;
  static constexpr bool kGrouped = true;

  INLINE static Shorts unpack(const uint8_t* p, int i) {
#if GPTNEO_FAST_LANES == 16
    typedef uint16_t Words16 __attribute__((vector_size(32)));
    const Words16 half = read<Words16>(p);
    const struct {
      Words16 low, high;
    } twice = {half, half >> 4};
    const UShorts words = same_bits<UShorts>(twice);
    return same_bits<Shorts>(i == 0 ? words & 15 : (words >> 8) & 15);
#else
    constexpr int kParts = 8 / kLanes;  // vectors that the 16 words are
    const UShorts words = read<UShorts>(p + i % kParts * 4 * kLanes);
    const int nibble = i / kParts;
    return same_bits<Shorts>(nibble == 3 ? words >> 12 : (words >> (4 * nibble)) & 15);
#endif
  }
#if defined(__AVX512VNNI__)
  // With x in its two bytes three instructions fewer; each lane sums the numbers that it has of `unpack`, too.
  static constexpr bool kSplits = true;
  INLINE static Ints products(const uint8_t* p, const int16_t* x) {
    const __m512i twice = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    const __m512i numbers = _mm512_and_si512(_mm512_srlv_epi64(twice, _mm512_setr_epi64(0, 0, 0, 0, 4, 4, 4, 4)), _mm512_set1_epi8(15));
    const __m512i high = _mm512_dpbusd_epi32(_mm512_setzero_si512(), numbers, read<__m512i>(x));
    return same_bits<Ints>(_mm512_dpbusd_epi32(_mm512_slli_epi32(high, 8), numbers, read<__m512i>(x + 2 * kLanes)));
  }
#else
  static constexpr bool kSplits = false;
#endif
};

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
  const uint8_t* numbers = static_cast<const uint8_t*>(p.weight[0]) + row * p.row_blocks * W::kBytes;
  const BFloat16* scales = static_cast<const BFloat16*>(p.scales[0]) + (W::kGrouped ? row * (p.row_blocks * kBlock / p.group) : 0);
  const float whole = W::kGrouped ? 0.0f : static_cast<const float*>(p.scales[0])[row];
  const int shift = p.group >= 4 * kHalfBlock ? 2 : p.group >= 2 * kHalfBlock ? 1 : 0;  // of groups of 128, 64 and 32
  for (int64_t first = 0; first < p.inputs; first += kBlock, numbers += W::kBytes) {
    int16_t integers[kBlock];
    UNROLL for (int i = 0; i < kVectors; ++i) {
      const Shorts some = W::unpack(numbers, i);
      memcpy(integers + i * 2 * kLanes, &some, sizeof(some));
    }
    float spare[kBlock];
    const int64_t left = p.inputs - first;
    UNROLL for (int i = 0; i < 2 * kVectors; ++i) {
      const int64_t k = i * kLanes;
      const float scale = W::kGrouped ? widen(scales[(first + k) / kHalfBlock >> shift]) : whole;
      const Floats value = (floats_of(integers + k) - W::kZero) * scale;
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
