// Vectors of GPTNEO_FAST_LANES floats: numbers of three kinds in and out of them, sums, e^x, gelu_new. A part of
// decode_lanes.cpp, in its nameless namespace and without the C++ library: nothing here may be a function that the linker
// could take for that of another instruction set.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define ROLL _Pragma("GCC unroll 1")  // where the compiler would add what it unrolls in another order, out of registers

namespace gptneo_fast {
namespace {

constexpr int kLanes = GPTNEO_FAST_LANES;

template <int L>
struct Vector {
  typedef float Floats __attribute__((vector_size(4 * L)));
  typedef int32_t Ints __attribute__((vector_size(4 * L)));
  typedef uint32_t Words __attribute__((vector_size(4 * L)));
  typedef uint16_t Halves __attribute__((vector_size(2 * L)));
};
template <int L>
using FloatsOf = typename Vector<L>::Floats;
using Floats = FloatsOf<kLanes>;
using Ints = Vector<kLanes>::Ints;
using Words = Vector<kLanes>::Words;

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename To, typename From>
INLINE To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// Memory is read and written through memcpy, which asks for no alignment; vectors in variables have their own.
template <typename V>
INLINE V read(const void* p) {
  V v;
  memcpy(&v, p, sizeof(v));
  return v;
}
template <typename V>
INLINE void write(float* p, V v) {
  memcpy(p, &v, sizeof(v));
}

template <int L>
INLINE FloatsOf<L> load(const float* p) {
  return read<FloatsOf<L>>(p);
}
template <int L>
INLINE FloatsOf<L> load(const BFloat16* p) {
#if defined(__AVX2__)  // where gcc would convert four at a time
  if constexpr (L == 8)
    return same_bits<FloatsOf<L>>(
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
#endif
#if defined(__AVX512F__)  // where gcc would convert eight at a time
  if constexpr (L == 16)
    return same_bits<FloatsOf<L>>(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
#endif
  using V = Vector<L>;
  return same_bits<FloatsOf<L>>(
      __builtin_convertvector(read<typename V::Halves>(p), typename V::Words) << 16);
}
template <int L>
INLINE FloatsOf<L> load(const Float16* p) {
#if defined(__F16C__)
  if constexpr (L == 4) return same_bits<FloatsOf<L>>(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  if constexpr (L == 8) return same_bits<FloatsOf<L>>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#if defined(__AVX512F__)
  if constexpr (L == 16)
    return same_bits<FloatsOf<L>>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#endif
#endif
  using V = Vector<L>;
  const auto bits = __builtin_convertvector(read<typename V::Halves>(p), typename V::Words);
  const auto sign = (bits & 0x8000u) << 16, rest = (bits & 0x7fffu) << 13;
  const auto finite = same_bits<typename V::Words>(same_bits<FloatsOf<L>>(rest) * 0x1p112f);  // subnormals, too
  const auto special = same_bits<typename V::Words>(rest >= 0x0f800000u);  // infinities and NaN
  return same_bits<FloatsOf<L>>(sign | (special & (rest | 0x7f800000u)) | (~special & finite));
}

// The last `count` numbers of a row, fewer than the lanes, and zeros.
template <int L, typename T>
INLINE FloatsOf<L> load_end(const T* p, int64_t count) {
  T part[L];
  memset(part, 0, sizeof(part));
  memcpy(part, p, count * sizeof(T));
  return load<L>(part);
}

INLINE float widen(float x) { return x; }
INLINE float widen(BFloat16 x) { return same_bits<float>(static_cast<uint32_t>(x.bits) << 16); }
INLINE float widen(Float16 x) {
  const Float16 four[4] = {x, x, x, x};
  return load<4>(four)[0];
}

// To the nearest, ties to even.
INLINE void narrow(float x, float* out) { *out = x; }
INLINE void narrow(float x, BFloat16* out) {
  const uint32_t bits = same_bits<uint32_t>(x);
  out->bits = x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
INLINE void narrow(float x, Float16* out) {
#if defined(__F16C__)
  out->bits = static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const uint32_t bits = same_bits<uint32_t>(x), sign = (bits >> 16) & 0x8000, size = bits & 0x7fffffff;
  uint32_t half;
  if (size > 0x7f800000) {
    half = 0x7e00;
  } else if (size >= 0x477ff000) {  // rounds to 65536
    half = 0x7c00;
  } else if (size < 0x38800000) {  // subnormal: the float adder rounds
    half = same_bits<uint32_t>(same_bits<float>(size) + 0.5f) - 0x3f000000;
  } else {
    half = (size - 0x38000000 + 0xfff + ((size >> 13) & 1)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
#endif
}

INLINE void narrow(Floats x, float* out) { write(out, x); }
INLINE void narrow(Floats x, BFloat16* out) {
  const Words bits = same_bits<Words>(x), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words number = same_bits<Words>(x == x);
  const Words low = (rounded & number) | (~number & 0x7fc0);
#if defined(__AVX512F__)
  const auto halves = _mm512_cvtepi32_epi16(same_bits<__m512i>(low));
#else
  const auto halves = __builtin_convertvector(low, Vector<kLanes>::Halves);
#endif
  memcpy(out, &halves, sizeof(halves));
}
INLINE void narrow(Floats x, Float16* out) {
#if defined(__F16C__)
  constexpr int kRound = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
#if defined(__AVX512F__)
  const auto halves = _mm512_cvtps_ph(same_bits<__m512>(x), kRound);
#else
  const auto halves = _mm256_cvtps_ph(same_bits<__m256>(x), kRound);
#endif
  memcpy(out, &halves, sizeof(halves));
#else
  for (int l = 0; l < kLanes; ++l) narrow(x[l], out + l);
#endif
}

template <typename T>
INLINE void store(const float* from, T* to, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) narrow(load<kLanes>(from + i), to + i);
  for (; i < count; ++i) narrow(from[i], to + i);
}

// Sums of lanes in pairs, which errs less than one after the other.
INLINE FloatsOf<4> four(FloatsOf<4> v) { return v; }
INLINE FloatsOf<4> four(FloatsOf<8> v) {
  FloatsOf<4> half[2];
  memcpy(half, &v, sizeof(v));
  return half[0] + half[1];
}
INLINE FloatsOf<4> four(FloatsOf<16> v) {
  FloatsOf<8> half[2];
  memcpy(half, &v, sizeof(v));
  return four(half[0] + half[1]);
}

template <typename V>
INLINE float sum(V v) {
  const FloatsOf<4> w = four(v);
  return (w[0] + w[2]) + (w[1] + w[3]);
}

// The same sums of four vectors at once.
template <typename V>
INLINE FloatsOf<4> sums(V v0, V v1, V v2, V v3) {
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
  const FloatsOf<4> a = four(v0), b = four(v1), c = four(v2), d = four(v3);
  const FloatsOf<4> ab = __builtin_shufflevector(a, b, 0, 1, 4, 5) + __builtin_shufflevector(a, b, 2, 3, 6, 7);
  const FloatsOf<4> cd = __builtin_shufflevector(c, d, 0, 1, 4, 5) + __builtin_shufflevector(c, d, 2, 3, 6, 7);
  return __builtin_shufflevector(ab, cd, 0, 2, 4, 6) + __builtin_shufflevector(ab, cd, 1, 3, 5, 7);
#define GPTNEO_FAST_SHUFFLES
#endif
#endif
#if !defined(GPTNEO_FAST_SHUFFLES)
  return FloatsOf<4>{sum(v0), sum(v1), sum(v2), sum(v3)};
#endif
}

// out[n] = the sum of each of N vectors.
template <int N, typename V>
INLINE void store_sums(const V* v, float* out) {
  int n = 0;
  if constexpr (N >= 4)
    UNROLL for (; n + 4 <= N; n += 4) write(out + n, sums(v[n], v[n + 1], v[n + 2], v[n + 3]));
  UNROLL for (; n < N; ++n) out[n] = sum(v[n]);
}

INLINE int32_t largest(Vector<4>::Ints v) {
  const int32_t a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
  return a > b ? a : b;
}
template <typename V>
INLINE int32_t largest(V v) {
  typename Vector<sizeof(V) / 8>::Ints half[2];
  memcpy(half, &v, sizeof(v));
  return largest(half[0] > half[1] ? half[0] : half[1]);
}

INLINE Floats choose(Ints where, Floats yes, Floats no) {
  return same_bits<Floats>((where & same_bits<Ints>(yes)) | (~where & same_bits<Ints>(no)));
}

// e^x: x = n ln 2 + r, e^r by the polynomial of Cephes' expf. 0 below -87.3, where e^x is no normal number; infinity above
// 88.7; NaN for NaN.
INLINE Floats exponential(Floats x) {
  const Ints low = x < -87.3f, high = x > 88.7f;
  const Floats within = choose(low | high, Floats{}, x);
  const Floats shifted = within * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer nearest to it in the lowest bits
  const Floats n = shifted - 12582912.0f;
  const Floats r = (within - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Floats e = same_bits<Floats>(same_bits<Words>(p) + (same_bits<Words>(shifted) << 23));  // wraps for NaN
  return choose(x == x, choose(low, Floats{}, choose(high, Floats{} + INFINITY, e)), x);
}

// x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) = x / (1 + exp(-2 sqrt(2/pi) (x + 0.044715 x^3)))
INLINE Floats gelu_new(Floats x) {
  return x / (1.0f + exponential(-1.5957691216057308f * (x + 0.044715f * x * x * x)));
}

}  // namespace
}  // namespace gptneo_fast
