// A step of decoding, and linear layers of a few rows, on vectors of GPTNEO_FAST_LANES floats; built once for each instruction set, see setup.py. What it
// includes must not leave functions behind that the linker could take for those of another CPU: no C++ library.
//
// All sums are float32 and go lane by lane, a row's numbers in order, then lanes in pairs. The order knows nothing of how
// many rows there are or which thread has them, so a row's bits do not depend on its company.
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "decode.h"

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

namespace gptneo_fast {
namespace {

constexpr int kLanes = GPTNEO_FAST_LANES;
constexpr int64_t kChunk = 512;      // numbers of a weight row that many rows of x go over while it is in the first-level cache
constexpr int kTogether = kLanes == 16 ? 4 : 2;  // rows of x that a weight is read for: with 4 weights, the registers
constexpr int64_t kGrain = 1 << 15;  // weights that are worth a thread
constexpr int64_t kColumns = 16;     // outputs that a thread takes at least: whole cache lines of a float32 result

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// ---- numbers ----

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

INLINE Floats choose(Ints where, Floats yes, Floats no) {
  return same_bits<Floats>((where & same_bits<Ints>(yes)) | (~where & same_bits<Ints>(no)));
}

// e^x to 2 ulp: x = n ln 2 + r, e^r by the polynomial of Cephes' expf. 0 below -87.3, where e^x is no normal number.
INLINE Floats exponential(Floats x) {
  const Ints low = x < -87.3f;
  x = choose(low, Floats{} - 87.3f, choose(x > 88.7f, Floats{} + 88.7f, x));
  const Floats shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer nearest to it in the lowest bits
  const Floats n = shifted - 12582912.0f;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Ints power = same_bits<Ints>(shifted) << 23;
  return choose(low, Floats{}, same_bits<Floats>(same_bits<Ints>(p) + power));
}

// x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) = x / (1 + exp(-2 sqrt(2/pi) (x + 0.044715 x^3)))
INLINE Floats gelu_new(Floats x) {
  return x / (1.0f + exponential(-1.5957691216057308f * (x + 0.044715f * x * x * x)));
}

// ---- products ----

// Row n of a product's weights.
template <typename T>
INLINE const T* row_of(const Product& p, int64_t n) {
  const int64_t part = p.parts == 1 ? 0 : n / p.outputs;
  return static_cast<const T*>(p.weight[part]) + (n - part * p.outputs) * p.inputs;
}

// out[n] = w[n] . x for N rows of weights that are far apart; x goes on with zeros to a multiple of the lanes.
template <int N, int L, typename T>
INLINE void dots(const T* const* w, const float* x, int64_t K, float* out) {
  FloatsOf<L> acc[N];
  UNROLL for (int n = 0; n < N; ++n) acc[n] = FloatsOf<L>{};
  int64_t k = 0;
  for (; k + L <= K; k += L) {
    const FloatsOf<L> value = load<L>(x + k);
    UNROLL for (int n = 0; n < N; ++n) acc[n] += load<L>(w[n] + k) * value;
  }
  if (k < K) {
    const FloatsOf<L> value = load<L>(x + k);
    for (int n = 0; n < N; ++n) acc[n] += load_end<L>(w[n] + k, K - k) * value;
  }
  store_sums<N>(acc, out);
}

// acc[r][n] += w[n] . x[r] lane by lane, for N pieces of weight rows and R rows of x.
template <int N, int R, typename T>
INLINE void gather(const T* const* w, const float* x, int64_t ldx, int64_t size, Floats (*acc)[N]) {
  Floats a[R][N];
  UNROLL for (int i = 0; i < R * N; ++i) a[i / N][i % N] = acc[i / N][i % N];
  const auto add = [&](int64_t k, const auto& weights) {
    Floats value[R];
    UNROLL for (int r = 0; r < R; ++r) value[r] = load<kLanes>(x + r * ldx + k);
    UNROLL for (int n = 0; n < N; ++n) {
      const Floats weight = weights(n);
      UNROLL for (int r = 0; r < R; ++r) a[r][n] += weight * value[r];
    }
  };
  int64_t k = 0;
  for (; k + kLanes <= size; k += kLanes) add(k, [&](int n) INLINE_LAMBDA { return load<kLanes>(w[n] + k); });
  if (k < size) add(k, [&](int n) INLINE_LAMBDA { return load_end<kLanes>(w[n] + k, size - k); });
  UNROLL for (int i = 0; i < R * N; ++i) acc[i / N][i % N] = a[i / N][i % N];
}

// The same as `dots` for M rows of x, the weights in pieces that stay in the first-level cache; out[m * N + n].
template <int N, typename T>
INLINE void many_dots(const T* const* w, const float* x, int64_t ldx, int64_t M, int64_t K, float* out) {
  Floats acc[kMaxRows][N];
  memset(acc, 0, M * sizeof(acc[0]));
  for (int64_t first = 0; first < K; first += kChunk) {
    const int64_t size = min(kChunk, K - first);
    const T* piece[N];
    for (int n = 0; n < N; ++n) piece[n] = w[n] + first;
    int64_t m = 0;
    for (; m + kTogether <= M; m += kTogether) gather<N, kTogether>(piece, x + m * ldx + first, ldx, size, acc + m);
    for (; m < M; ++m) gather<N, 1>(piece, x + m * ldx + first, ldx, size, acc + m);
  }
  for (int64_t m = 0; m < M; ++m) store_sums<N>(acc[m], out + m * N);
}

// Outputs [begin, end) of M rows: y[m * ldy + n]. The weights are read as N streams far apart, which memory serves faster.
template <int N, typename T>
INLINE void streams(const Product& p, const float* x, int64_t ldx, int64_t M, int64_t begin, int64_t end, float* y, int64_t ldy) {
  const int64_t far = (end - begin) / N;
  for (int64_t i = begin; i < begin + far; ++i) {
    const T* w[N];
    float out[kMaxRows * N];
    for (int n = 0; n < N; ++n) w[n] = row_of<T>(p, i + n * far);
    if (M == 1) {
      dots<N, kLanes>(w, x, p.inputs, out);
    } else {
      many_dots<N>(w, x, ldx, M, p.inputs, out);
    }
    for (int64_t m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) y[m * ldy + i + n * far] = out[m * N + n];
  }
  if constexpr (N > 1) streams<1, T>(p, x, ldx, M, begin + far * N, end, y, ldy);
}

template <typename Task>
void parallel(Parallel run, int64_t count, int64_t grain, const Task& task) {
  if (count <= grain) {
    if (count > 0) task(int64_t{0}, count);
    return;
  }
  run(count, grain, [](int64_t begin, int64_t end, void* context) { (*static_cast<const Task*>(context))(begin, end); },
      const_cast<Task*>(&task));
}

// One product of M rows, then `finish(begin, end)` on the outputs of each piece.
template <typename T, typename Finish>
void product(Parallel run, const Product& p, const float* x, int64_t ldx, int64_t M, float* y, int64_t ldy, const Finish& finish) {
  const int64_t N = p.parts * p.outputs, pieces = (N + kColumns - 1) / kColumns;
  parallel(run, pieces, max(1, kGrain / (kColumns * p.inputs)), [&](int64_t first, int64_t last) {
    const int64_t begin = first * kColumns, end = min(N, last * kColumns);
    streams<4, T>(p, x, ldx, M, begin, end, y, ldy);
    finish(begin, end);
  });
}

// ---- the parts of a block ----

template <typename T>
void layer_norm(const Norm& norm, const float* x, float* y, int64_t C, int64_t ld, int64_t M) {
  const T *weight = static_cast<const T*>(norm.weight), *bias = static_cast<const T*>(norm.bias);
  for (int64_t m = 0; m < M; ++m, x += ld, y += ld) {
    const int64_t whole = C / kLanes * kLanes;
    Floats total = {};
    for (int64_t c = 0; c < C; c += kLanes) total += load<kLanes>(x + c);  // goes on with zeros
    const float mean = sum(total) / C;
    total = Floats{};
    for (int64_t c = 0; c < whole; c += kLanes) {
      const Floats d = load<kLanes>(x + c) - mean;
      total += d * d;
    }
    float rest[kLanes] = {};
    for (int64_t c = whole; c < C; ++c) rest[c - whole] = x[c] - mean;
    total += load<kLanes>(rest) * load<kLanes>(rest);
    const float scale = 1.0f / sqrtf(sum(total) / C + norm.eps);
    for (int64_t c = 0; c < whole; c += kLanes)
      write(y + c, (load<kLanes>(x + c) - mean) * scale * load<kLanes>(weight + c) + load<kLanes>(bias + c));
    for (int64_t c = whole; c < C; ++c) y[c] = (x[c] - mean) * scale * widen(weight[c]) + widen(bias[c]);
  }
}

// x += y + bias, columns [begin, end).
template <typename T>
void add(float* x, const float* y, const void* bias, int64_t begin, int64_t end) {
  const T* b = static_cast<const T*>(bias);
  int64_t n = begin;
  for (; n + kLanes <= end; n += kLanes)
    write(x + n, load<kLanes>(x + n) + (load<kLanes>(y + n) + load<kLanes>(b + n)));
  for (; n < end; ++n) x[n] += y[n] + widen(b[n]);
}

// y = gelu_new(y + bias), columns [begin, end).
template <typename T>
void activate(float* y, const void* bias, int64_t begin, int64_t end) {
  const T* b = static_cast<const T*>(bias);
  int64_t n = begin;
  for (; n + kLanes <= end; n += kLanes) write(y + n, gelu_new(load<kLanes>(y + n) + load<kLanes>(b + n)));
  if (n < end) {
    float part[kLanes] = {};
    for (int64_t i = n; i < end; ++i) part[i - n] = y[i] + widen(b[i]);
    write(part, gelu_new(load<kLanes>(part)));
    memcpy(y + n, part, (end - n) * sizeof(float));
  }
}

template <typename T>
void store(const float* from, T* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) narrow(from[i], to + i);
}

// Scores of `count` keys that lie one behind another: eight at a time, to have as many sums on the way.
template <int L, typename T>
INLINE void scores_of(const T* keys, int64_t stride, const float* q, int64_t D, int64_t count, float* scores) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const T* rows[8];
    for (int n = 0; n < 8; ++n) rows[n] = keys + (i + n) * stride;
    dots<8, L>(rows, q, D, scores + i);
  }
  for (; i < count; ++i) {
    const T* row = keys + i * stride;
    dots<1, L>(&row, q, D, scores + i);
  }
}

// out[d] += weights . values[:, d] for N vectors of L numbers, in 8 / N chains so that no addition waits for the last.
template <int N, int L, typename T>
INLINE void weigh(const T* values, int64_t stride, const float* weights, int64_t count, FloatsOf<L> (&acc)[8 / N][N]) {
  constexpr int kChains = 8 / N;
  int64_t i = 0;
  for (; i + kChains <= count; i += kChains)
    UNROLL for (int c = 0; c < kChains; ++c)
      UNROLL for (int n = 0; n < N; ++n) acc[c][n] += load<L>(values + (i + c) * stride + n * L) * weights[i + c];
  for (; i < count; ++i)
    UNROLL for (int n = 0; n < N; ++n) acc[0][n] += load<L>(values + i * stride + n * L) * weights[i];
}

// What one query sees of a ring: slots [first, first + count[0]), then [0, count[1]).
struct Seen {
  int64_t first, count[2];
};

template <int N, int L, typename T>
INLINE void values_of(const T* values, int64_t stride, const Seen& seen, const float* weights, float scale, float* out) {
  FloatsOf<L> acc[8 / N][N];
  UNROLL for (int n = 0; n < 8; ++n) acc[n / N][n % N] = FloatsOf<L>{};
  weigh<N, L>(values + seen.first * stride, stride, weights, seen.count[0], acc);
  weigh<N, L>(values, stride, weights + seen.count[0], seen.count[1], acc);
  UNROLL for (int n = 0; n < N; ++n) {
    for (int c = 1; c < 8 / N; ++c) acc[0][n] += acc[c][n];
    write(out + n * L, acc[0][n] * scale);
  }
}

// softmax(q k^T) v over what is seen, without the factor 1/sqrt(D); zeros where that is nothing.
template <int L, typename T>
INLINE void attend(const Layer& layer, const T* keys, const T* values, const Seen& seen, const float* q, int64_t D, float* scores,
                   float* out) {
  const int64_t stride = layer.token, count = seen.count[0] + seen.count[1];
  scores_of<L>(keys + seen.first * stride, stride, q, D, seen.count[0], scores);
  scores_of<L>(keys, stride, q, D, seen.count[1], scores + seen.count[0]);
  for (int64_t i = count; i < padded(count); ++i) scores[i] = -INFINITY;
  Floats best = load<kLanes>(scores), total = {};
  for (int64_t i = kLanes; i < count; i += kLanes) {
    const Floats more = load<kLanes>(scores + i);
    best = choose(more > best, more, best);
  }
  float top = best[0];
  for (int l = 1; l < kLanes; ++l) top = best[l] > top ? best[l] : top;
  for (int64_t i = 0; i < count; i += kLanes) {
    const Floats e = exponential(load<kLanes>(scores + i) - top);
    write(scores + i, e);
    total += e;
  }
  const float scale = 1.0f / sum(total);
  int64_t d = 0;
  for (; d + 4 * L <= D; d += 4 * L) values_of<4, L>(values + d, stride, seen, scores, scale, out + d);
  for (; d + L <= D; d += L) values_of<1, L>(values + d, stride, seen, scores, scale, out + d);
  for (; d < D; ++d) {
    float y = 0;
    for (int64_t i = 0; i < seen.count[0]; ++i) y += widen(values[(seen.first + i) * stride + d]) * scores[i];
    for (int64_t i = 0; i < seen.count[1]; ++i) y += widen(values[i * stride + d]) * scores[seen.count[0] + i];
    out[d] = y * scale;
  }
}

// Heads [begin, end) of the B * H in all: their new keys and values into the slots, then attention of their T queries.
template <typename T>
void heads(const Step& s, const Layer& layer, const float* qkv, int64_t ld, float* y, int64_t ldy, float* scores, int64_t begin,
           int64_t end) {
  const int64_t C = s.C(), D = s.D;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / s.H, h = i % s.H, start = s.starts ? s.starts[b] : 0, held = s.lengths[b];
    T* keys = reinterpret_cast<T*>(layer.keys) + b * layer.batch + h * layer.head;
    T* values = reinterpret_cast<T*>(layer.values) + b * layer.batch + h * layer.head;
    const float* rows = qkv + b * s.T * ld + h * D;
    for (int64_t t = start; t < s.T; ++t) {
      const int64_t slot = (held + t - start) % layer.R;
      store(rows + t * ld + C, keys + slot * layer.token, D);
      store(rows + t * ld + 2 * C, values + slot * layer.token, D);
    }
    for (int64_t t = 0; t < s.T; ++t) {
      const int64_t last = held + t - start, first = layer.window ? max(0, last - layer.window + 1) : 0;
      float* out = y + (b * s.T + t) * ldy + h * D;
      if (last < first) {
        memset(out, 0, D * sizeof(float));
        continue;
      }
      const int64_t count = last - first + 1, slot = first % layer.R;
      const Seen seen = {slot, {min(count, layer.R - slot), max(0, count - (layer.R - slot))}};
      float query[2 * kPad * 16];  // goes on with zeros
      const float* q = rows + t * ld;
      if (D % kPad) {
        memset(query + D / kPad * kPad, 0, kPad * sizeof(float));
        memcpy(query, q, D * sizeof(float));
        q = query;
      }
      float* own = scores + i * padded(layer.R);
      if (D % kLanes == 0) {
        attend<kLanes>(layer, keys, values, seen, q, D, own, out);
      } else {
        attend<4>(layer, keys, values, seen, q, D, own, out);
      }
    }
  }
}

// ---- the step ----

template <typename T>
void embed(const Step& s, float* x, int64_t ld) {
  const int64_t C = s.C();
  const T *wte = static_cast<const T*>(s.wte), *wpe = static_cast<const T*>(s.wpe);
  for (int64_t m = 0; m < s.B * s.T; ++m, x += ld) {
    if (!s.ids) {
      const T* from = static_cast<const T*>(s.x) + m * C;
      for (int64_t c = 0; c < C; ++c) x[c] = widen(from[c]);
      continue;
    }
    const T* token = wte + s.ids[m] * C;
    const T* place = wpe + s.positions[s.position_rows == 1 ? m % s.T : m] * C;
    const T* type = s.types ? wte + s.types[m] * C : nullptr;
    for (int64_t c = 0; c < C; ++c) x[c] = widen(token[c]) + widen(place[c]) + (type ? widen(type[c]) : 0.0f);
  }
}

// The first of the largest logits, or -1 where one is not finite.
int64_t likeliest(const float* logits, int64_t V) {
  const int64_t whole = V / kLanes * kLanes;
  Floats best = Floats{} - INFINITY, zeros = {};
  for (int64_t v = 0; v < whole; v += kLanes) {
    const Floats more = load<kLanes>(logits + v);
    best = choose(more > best, more, best);
    zeros += more * 0.0f;  // NaN where one is not finite
  }
  float top = -INFINITY;
  bool finite = true;
  for (int l = 0; l < kLanes; ++l) {
    top = best[l] > top ? best[l] : top;
    finite = finite && zeros[l] == 0.0f;
  }
  for (int64_t v = whole; v < V; ++v) {
    top = logits[v] > top ? logits[v] : top;
    finite = finite && logits[v] * 0.0f == 0.0f;
  }
  if (!finite) return -1;
  for (int64_t v = 0;; ++v)
    if (logits[v] == top) return v;
}

template <typename T>
void decode(const Step& s, Parallel run, float* workspace) {
  const int64_t M = s.B * s.T, C = s.C(), ld = padded(C);
  int64_t inner = 3 * C, slots = 0;
  for (int64_t i = 0; i < s.L; ++i) inner = max(inner, s.layers[i].c_fc.outputs), slots = max(slots, s.layers[i].R);
  const int64_t ldi = padded(inner);
  float* x = workspace;      // [M, ld] the residual stream
  float* y = x + M * ld;     // [M, ld] what a product reads
  float* z = y + M * ld;     // [M, ld] what it gives
  float* wide = z + M * ld;  // [M, ldi] q, k and v; the inner rows of the MLP
  float* scores = wide + M * ldi;
  for (int64_t m = 0; m < M; ++m)
    for (int64_t c = C; c < ld; ++c) x[m * ld + c] = y[m * ld + c] = 0;
  const auto each = [M](const auto& of_row) {
    for (int64_t m = 0; m < M; ++m) of_row(m);
  };
  embed<T>(s, x, ld);
  for (int64_t i = 0; i < s.L; ++i) {
    const Layer& layer = s.layers[i];
    const auto add_to_x = [&](const Product& p) {
      return [&, bias = p.bias](int64_t begin, int64_t end) { each([&](int64_t m) { add<T>(x + m * ld, z + m * ld, bias, begin, end); }); };
    };
    layer_norm<T>(layer.ln_1, x, y, C, ld, M);
    product<T>(run, layer.qkv, y, ld, M, wide, ldi, [](int64_t, int64_t) {});
    const int64_t sight = layer.window ? min(layer.window, layer.R) : layer.R;
    parallel(run, s.B * s.H, max(1, kGrain / (2 * sight * s.D * s.T)), [&](int64_t begin, int64_t end) {
      heads<T>(s, layer, wide, ldi, y, ld, scores, begin, end);
    });
    product<T>(run, layer.out_proj, y, ld, M, z, ld, add_to_x(layer.out_proj));
    layer_norm<T>(layer.ln_2, x, y, C, ld, M);
    const int64_t F = layer.c_fc.outputs;
    product<T>(run, layer.c_fc, y, ld, M, wide, ldi, [&](int64_t begin, int64_t end) {
      each([&](int64_t m) { activate<T>(wide + m * ldi, layer.c_fc.bias, begin, end); });
    });
    each([&](int64_t m) { memset(wide + m * ldi + F, 0, (padded(F) - F) * sizeof(float)); });
    product<T>(run, layer.c_proj, wide, ldi, M, z, ld, add_to_x(layer.c_proj));
  }
  for (int64_t b = 0; b < s.B; ++b)  // the kept rows to the front, where they came from further behind
    for (int64_t t = 0; t < s.keep; ++t) memmove(x + (b * s.keep + t) * ld, x + ((b + 1) * s.T - s.keep + t) * ld, C * sizeof(float));
  const int64_t kept = s.B * s.keep;
  if (s.norm) layer_norm<T>(*s.norm, x, y, C, ld, kept);
  const float* last = s.norm ? y : x;
  if (!s.head) {
    for (int64_t m = 0; m < kept; ++m) store(last + m * ld, static_cast<T*>(s.out) + m * C, C);
    return;
  }
  float* logits = static_cast<float*>(s.out);
  product<T>(run, *s.head, last, ld, kept, logits, s.V, [](int64_t, int64_t) {});
}

template <typename T>
void linear(const Linear& l, Parallel run, float* workspace) {
  const int64_t M = l.M, K = l.product.inputs, N = l.product.outputs, ld = padded(K), ldy = padded(N);
  float *x = workspace, *normed = x + M * ld, *y = normed + M * ld;
  for (int64_t m = 0; m < M; ++m) {
    const T* from = static_cast<const T*>(l.x) + m * K;
    for (int64_t k = 0; k < K; ++k) x[m * ld + k] = widen(from[k]);
    for (int64_t k = K; k < ld; ++k) x[m * ld + k] = normed[m * ld + k] = 0;
  }
  if (l.norm) layer_norm<T>(*l.norm, x, normed, K, ld, M);
  const T *bias = static_cast<const T*>(l.product.bias), *residual = static_cast<const T*>(l.residual);
  product<T>(run, l.product, l.norm ? normed : x, ld, M, y, ldy, [&](int64_t begin, int64_t end) {
    for (int64_t m = 0; m < M; ++m) {
      float* row = y + m * ldy;
      if (l.gelu) activate<T>(row, bias, begin, end);
      for (int64_t n = begin; n < end; ++n) {
        const float value = row[n] + (bias && !l.gelu ? widen(bias[n]) : 0.0f);
        narrow(value + (residual ? widen(residual[m * N + n]) : 0.0f), static_cast<T*>(l.out) + m * N + n);
      }
    }
  });
}

void linear_any(const Linear& l, Parallel run, float* workspace) {
  switch (l.number) {
    case Number::kFloat32: return linear<float>(l, run, workspace);
    case Number::kBFloat16: return linear<BFloat16>(l, run, workspace);
    case Number::kFloat16: return linear<Float16>(l, run, workspace);
  }
}

void decode_any(const Step& s, Parallel run, float* workspace) {
  switch (s.number) {
    case Number::kFloat32: return decode<float>(s, run, workspace);
    case Number::kBFloat16: return decode<BFloat16>(s, run, workspace);
    case Number::kFloat16: return decode<Float16>(s, run, workspace);
  }
}

}  // namespace

const Lanes JOIN(lanes_, GPTNEO_FAST_LANES) = {decode_any, linear_any, likeliest};

}  // namespace gptneo_fast
