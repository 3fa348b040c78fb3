// Products with weights in 8 and 4 bits. A part of decode_lanes.cpp.
//
// The rows of x are rounded to 16 bits first, each block with a scale of its own: an error of 2^-16 of the largest of
// them, where bfloat16 would err by 2^-9 of each. Then 64 products are one exact sum of integers, and a row costs a few
// instructions for 16 weights on any of these CPUs; in floats it costs twice as many as memory has time for. With x in 8 bits
// one in three would go, and tokens would be others than those of the weights. What is summed in float32, block after block,
// knows nothing of how many rows there are or which thread has them.
#pragma once

#include "packed.h"
#include "products.h"

namespace gptneo_fast {
namespace {

constexpr float kLargest = 32639;        // of x in 16 bits: the higher byte of one that is rounded to 256 is at most 127
constexpr int64_t kBlocks = 16;          // that many rows of x go over while they are in the first-level cache
constexpr int64_t kUnits = 2 * kBlocks;  // of them at most: numbers that share scales of x and of weights are blocks, or halves
constexpr int kRounded = kLanes == 16 ? 4 : 2;  // rows of x that weights are read for

inline int64_t blocks_of(int64_t K) { return (K + kBlock - 1) / kBlock; }

// acc += the sums of neighbours' products.
INLINE Ints add_products(Ints acc, Shorts a, Shorts b) {
#if defined(__AVX512VNNI__)
  return same_bits<Ints>(_mm512_dpwssd_epi32(same_bits<__m512i>(acc), same_bits<__m512i>(a), same_bits<__m512i>(b)));
#elif defined(__AVX512BW__)
  return acc + same_bits<Ints>(_mm512_madd_epi16(same_bits<__m512i>(a), same_bits<__m512i>(b)));
#elif defined(__AVX2__)
  return acc + same_bits<Ints>(_mm256_madd_epi16(same_bits<__m256i>(a), same_bits<__m256i>(b)));
#elif defined(__SSE2__)
  return acc + same_bits<Ints>(_mm_madd_epi16(same_bits<__m128i>(a), same_bits<__m128i>(b)));
#else
  UNROLL for (int l = 0; l < kLanes; ++l) acc[l] += int32_t{a[2 * l]} * b[2 * l] + int32_t{a[2 * l + 1]} * b[2 * l + 1];
  return acc;
#endif
}

// Rows of x in 16 bits; a block is one unit or two.
struct Rounded {
  float* scales;     // [M, units]
  float* sums;       // [M, units]: -8 times the sum of a unit's numbers, which weights that are 8 too large ask for
  int16_t* numbers;  // [M, blocks * 64]
  int64_t K, units;
  bool split;  // word i of a block has the higher bytes of numbers i and 32 + i, word 32 + i the lower ones

  Rounded(float* space, int64_t M, int64_t inputs, int64_t parts, bool in_bytes)
      : scales(space), K(inputs), units(blocks_of(inputs) * parts), split(in_bytes) {
    sums = scales + M * padded(units);
    numbers = reinterpret_cast<int16_t*>(sums + M * padded(units));
  }

  const int16_t* block(int64_t m, int64_t b) const { return numbers + (m * blocks_of(K) + b) * kBlock; }

  void round(int64_t m, const float* x) const {
    const int64_t blocks = blocks_of(K), parts = units / blocks;
    float *scale_of = scales + m * padded(units), *sum_of = sums + m * padded(units);
    for (int64_t b = 0; b < blocks; ++b) {
      float spare[kBlock] = {};
      const float* from = x + b * kBlock;
      if (const int64_t left = K - b * kBlock; left < kBlock) {
        memcpy(spare, from, left * sizeof(float));
        from = spare;
      }
      Floats most = {}, zeros = {};
      for (int64_t k = 0; k < kBlock; k += kLanes) {
        const Floats value = load<kLanes>(from + k), size = same_bits<Floats>(same_bits<Ints>(value) & 0x7fffffff);
        most = choose(size > most, size, most);
        zeros += value * 0.0f;  // NaN where one is not finite
      }
      float largest = 0;
      for (int l = 0; l < kLanes; ++l) largest = most[l] > largest ? most[l] : largest;
      const float nothing = sum(zeros);
      const bool some = nothing == 0.0f && largest > 1e-30f;
      const float scale = nothing != 0.0f ? nothing : some ? largest / kLargest : 0.0f;
      const float inverse = some ? kLargest / largest : 0.0f;
      int16_t* to = numbers + (m * blocks + b) * kBlock;
      for (int64_t part = 0; part < parts; ++part) {
        Floats total = {};
        for (int64_t k = part * kBlock / parts; k < (part + 1) * kBlock / parts; k += kLanes) {
          const Floats value = some ? load<kLanes>(from + k) * inverse : Floats{};
          const Floats shifted = value + 12582912.0f;  // 1.5 * 2^23: the integer nearest to it in the lowest bits
          total += shifted - 12582912.0f;
          typedef int16_t Some __attribute__((vector_size(2 * kLanes)));
          const Some narrow = __builtin_convertvector(same_bits<Ints>(shifted) - 0x4b400000, Some);
          memcpy(to + k, &narrow, sizeof(narrow));
        }
        scale_of[b * parts + part] = scale;
        sum_of[b * parts + part] = -8.0f * sum(total);
      }
      if (split) split_block(to);
    }
    for (int64_t u = units; u < padded(units); ++u) scale_of[u] = sum_of[u] = 0;
  }

 private:
  INLINE static void split_block(int16_t* at) {
    typedef int16_t Half __attribute__((vector_size(kBlock)));
    const Half front = read<Half>(at), back = read<Half>(at + kBlock / 2);
    const Half high = (((front + 128) >> 8) & 255) | (((back + 128) >> 8) << 8), low = (front & 255) | (back << 8);
    memcpy(at, &high, sizeof(high));
    memcpy(at + kBlock / 2, &low, sizeof(low));
  }
};

// sum[r][n] += of a block the products of N rows of weights, whose vectors `weight(n, i)` gives, and of R rows of x.
template <int N, int R, int kParts, typename Weight, typename Factor>
INLINE void add_block(const Weight& weight, const int16_t* const* x, const Factor& factor, Floats (*sum)[N]) {
  constexpr int kSummed = kVectors / kParts;
  UNROLL for (int u = 0; u < kParts; ++u) {
    Shorts value[R][kSummed];
    UNROLL for (int i = 0; i < R * kSummed; ++i)
      value[i / kSummed][i % kSummed] = read<Shorts>(x[i / kSummed] + (u * kSummed + i % kSummed) * 2 * kLanes);
    UNROLL for (int n = 0; n < N; ++n) {
      Ints total[R];
      UNROLL for (int r = 0; r < R; ++r) total[r] = Ints{};
      UNROLL for (int i = 0; i < kSummed; ++i) {
        const Shorts w = weight(n, u * kSummed + i);
        UNROLL for (int r = 0; r < R; ++r) total[r] = add_products(total[r], w, value[r][i]);
      }
      UNROLL for (int r = 0; r < R; ++r) sum[r][n] += __builtin_convertvector(total[r], Floats) * factor(r, n, u);
    }
  }
}

// Scales of weights of the units [first, first + count) of a row, whose scales go on to `end` with those of later rows; what
// stands behind them is finite.
INLINE void widen_scales(const BFloat16* row, const BFloat16* end, int64_t group, int64_t first, int64_t count, float* out) {
  if (group > kBlock) {
    const int64_t each = group / kBlock;  // units, of which `first` is a multiple
    row += first / each;
    for (int64_t u = 0; u < kUnits; u += each, ++row) {
      const float scale = u < count ? widen(*row) : 0.0f;
      for (int64_t i = 0; i < each; ++i) out[u + i] = scale;
    }
    return;
  }
  row += first;
  BFloat16 part[kUnits];
  if (end - row < kUnits) {
    memset(part, 0, sizeof(part));
    memcpy(part, row, count * sizeof(BFloat16));
    row = part;
  }
  for (int64_t u = 0; u < count; u += kLanes) write(out + u, load<kLanes>(row + u));
}

// acc[r][n] += the products of `count` blocks of N rows of weights and R rows of x; `add` is `add_block` of one of them.
// `scales(n, u)` are those of weights from unit u of the count on; finite numbers may follow.
template <typename W, int N, int R, int kParts, typename Add, typename Scales>
INLINE void gather_blocks(const Add& add, const Rounded& x, int64_t m, int64_t first, int64_t count,
                          const Scales& scales, Floats (*acc)[N]) {
  const int64_t ld = padded(x.units);
  const float* own = x.scales + m * ld + first * kParts;
  Floats sum[R][N];
  UNROLL for (int i = 0; i < R * N; ++i) sum[i / N][i % N] = acc[i / N][i % N];
  float factors[R][N][kUnits];
  if constexpr (W::kGrouped)
    for (int64_t u = 0; u < count * kParts; u += kLanes)
      UNROLL for (int r = 0; r < R; ++r) {
        const Floats scale = load<kLanes>(own + r * ld + u), shift = load<kLanes>(x.sums + (m + r) * ld + first * kParts + u);
        UNROLL for (int n = 0; n < N; ++n) {
          const Floats product = scale * scales(n, u);
          write(factors[r][n] + u, product);
          sum[r][n] += product * shift;
        }
      }
  for (int64_t b = 0; b < count; ++b) {
    const int16_t* at[R];
    UNROLL for (int r = 0; r < R; ++r) at[r] = x.block(m + r, first + b);
    add(b, at, [&](int r, int n, int u) INLINE_LAMBDA { return W::kGrouped ? factors[r][n][b * kParts + u] : own[r * ld + b]; },
        sum);
  }
  UNROLL for (int i = 0; i < R * N; ++i) acc[i / N][i % N] = sum[i / N][i % N];
}

// N rows of weights: their integers, their scales, and where the scales of the last row end.
template <int N>
struct Packed {
  const uint8_t* numbers[N];
  const void *scales[N], *ends[N];

  INLINE const BFloat16* group(int n) const { return static_cast<const BFloat16*>(scales[n]); }

  // Whether each row's scales, and behind them those of later rows, go on for as many as `units`.
  INLINE bool go_on(int64_t units) const {
    bool all = true;
    UNROLL for (int n = 0; n < N; ++n) all = all && group(n) + units <= static_cast<const BFloat16*>(ends[n]);
    return all;
  }
};

template <typename W, int N, int kParts>
INLINE void widen_all_scales(const Product& p, const Packed<N>& w, int64_t first, int64_t count, float (*out)[kUnits]) {
  for (int n = 0; n < N; ++n)
    widen_scales(w.group(n), static_cast<const BFloat16*>(w.ends[n]), p.group, first * kParts, count * kParts, out[n]);
}

// Sums of lanes to out[n], times the scales of rows where those have one.
template <typename W, int N>
INLINE void finish_sums(const Floats* sum, const Packed<N>& w, float* out) {
  store_sums<N>(sum, out);
  if (!W::kGrouped)
    UNROLL for (int n = 0; n < N; ++n) out[n] *= *static_cast<const float*>(w.scales[n]);
}

// Whether one row of x is taken in bytes.
template <typename W, int kParts>
constexpr bool kSplit = W::kSplits && kParts == 1;

// Outputs of N rows of weights for one row of x.
template <typename W, int N, int kParts>
INLINE void integer_dots(const Product& p, const Packed<N>& w, const Rounded& x, float* out) {
  const int64_t blocks = blocks_of(x.K);
  Floats acc[1][N];
  UNROLL for (int n = 0; n < N; ++n) acc[0][n] = Floats{};
  for (int64_t first = 0; first < blocks; first += kBlocks) {
    const int64_t count = min(kBlocks, blocks - first);
    const auto add = [&](int64_t b, const int16_t* const* at, const auto& factor, Floats (*sum)[N]) INLINE_LAMBDA {
      const auto packed = [&](int n) INLINE_LAMBDA { return w.numbers[n] + (first + b) * W::kBytes; };
      if constexpr (kSplit<W, kParts>) {
        UNROLL for (int n = 0; n < N; ++n)
          sum[0][n] += __builtin_convertvector(W::products(packed(n), at[0]), Floats) * factor(0, n, 0);
      } else {
        add_block<N, 1, kParts>([&](int n, int i) INLINE_LAMBDA { return W::unpack(packed(n), i); }, at, factor, sum);
      }
    };
    if constexpr (!W::kGrouped) {
      gather_blocks<W, N, 1, kParts>(add, x, 0, first, count, [](int, int64_t) INLINE_LAMBDA { return Floats{}; }, acc);
    } else {
      if (p.group > kBlock || !w.go_on((first + kBlocks) * kParts)) {
        float scales[N][kUnits];
        widen_all_scales<W, N, kParts>(p, w, first, count, scales);
        gather_blocks<W, N, 1, kParts>(add, x, 0, first, count,
                                       [&](int n, int64_t u) INLINE_LAMBDA { return load<kLanes>(scales[n] + u); }, acc);
      } else {
        gather_blocks<W, N, 1, kParts>(
            add, x, 0, first, count,
            [&](int n, int64_t u) INLINE_LAMBDA { return load<kLanes>(w.group(n) + first * kParts + u); }, acc);
      }
    }
  }
  finish_sums<W, N>(acc[0], w, out);
}

template <int R>
struct Rows {
  constexpr int operator()() const { return R; }
};

// The same for M rows of x: out[m * N + n].
template <typename W, int N, int kParts>
INLINE void many_integer_dots(const Product& p, const Packed<N>& w, const Rounded& x, int64_t M, float* out) {
  const int64_t blocks = blocks_of(x.K);
  Floats acc[kManyRows][N];
  memset(acc, 0, M * sizeof(acc[0]));
  for (int64_t first = 0; first < blocks; first += kBlocks) {
    const int64_t count = min(kBlocks, blocks - first);
    alignas(64) int16_t wide[N][kBlocks * kBlock];  // unpacked once, and not for each row of x
    for (int n = 0; n < N; ++n)
      for (int64_t b = 0; b < count; ++b)
        UNROLL for (int i = 0; i < kVectors; ++i) {
          const Shorts weight = W::unpack(w.numbers[n] + (first + b) * W::kBytes, i);
          memcpy(wide[n] + b * kBlock + i * 2 * kLanes, &weight, sizeof(weight));
        }
    float wide_scales[N][kUnits];
    const auto scales = [&](int n, int64_t u) INLINE_LAMBDA { return load<kLanes>(wide_scales[n] + u); };
    if constexpr (W::kGrouped) widen_all_scales<W, N, kParts>(p, w, first, count, wide_scales);
    const auto gather = [&](auto rows, int64_t m) INLINE_LAMBDA {
      const auto add = [&](int64_t b, const int16_t* const* at, const auto& factor, Floats (*sum)[N]) INLINE_LAMBDA {
        add_block<N, rows(), kParts>(
            [&](int n, int i) INLINE_LAMBDA { return read<Shorts>(wide[n] + b * kBlock + i * 2 * kLanes); }, at, factor, sum);
      };
      gather_blocks<W, N, rows(), kParts>(add, x, m, first, count, scales, acc + m);
    };
    int64_t m = 0;
    for (; m + kRounded <= M; m += kRounded) gather(Rows<kRounded>(), m);
    for (; m < M; ++m) gather(Rows<1>(), m);
  }
  for (int64_t m = 0; m < M; ++m) finish_sums<W, N>(acc[m], w, out + m * N);
}

// As `streams`, for weights in few bits.
template <typename W, int N, int kParts>
INLINE void integer_streams(const Product& p, const Rounded& x, int64_t M, int64_t begin, int64_t end, float* y, int64_t ldy) {
  const int64_t far = (end - begin) / N, bytes = p.row_blocks * W::kBytes;
  const int64_t scale_bytes = W::kGrouped ? p.row_blocks * kBlock / p.group * 2 : 4;
  for (int64_t i = begin; i < begin + far; ++i) {
    Packed<N> w;
    UNROLL for (int n = 0; n < N; ++n) {
      const int64_t row = i + n * far, part = p.parts == 1 ? 0 : row / p.outputs, at = row - part * p.outputs;
      w.numbers[n] = static_cast<const uint8_t*>(p.weight[part]) + at * bytes;
      w.scales[n] = static_cast<const char*>(p.scales[part]) + at * scale_bytes;
      w.ends[n] = static_cast<const char*>(p.scales[part]) + p.outputs * scale_bytes;
    }
    if (M == 1) {
      float out[N];
      integer_dots<W, N, kParts>(p, w, x, out);
      UNROLL for (int n = 0; n < N; ++n) y[i + n * far] = out[n];
    } else {
      float out[kManyRows * N];
      many_integer_dots<W, N, kParts>(p, w, x, M, out);
      for (int64_t m = 0; m < M; ++m)
        UNROLL for (int n = 0; n < N; ++n) y[m * ldy + i + n * far] = out[m * N + n];
    }
  }
  if constexpr (N > 1) integer_streams<W, 1, kParts>(p, x, M, begin + far * N, end, y, ldy);
}

// One function for all products: compiled once, and not for each of them.
template <typename W, int kParts>
__attribute__((noinline)) void integer_outputs(const Product& p, const Rounded& x, int64_t M, int64_t begin, int64_t end, float* y,
                                               int64_t ldy) {
  integer_streams<W, 4, kParts>(p, x, M, begin, end, y, ldy);
}

// As `product`, for weights in few bits; `space` is for the rows of x in 16 bits.
template <typename W, int kParts, typename Finish>
void integer_product(Parallel run, const Product& p, const float* x, int64_t ldx, int64_t M, float* y, int64_t ldy, float* space,
                     const Finish& finish) {
  const Rounded rows(space, M, p.inputs, kParts, kSplit<W, kParts> && M == 1);
  parallel(run, M, max(1, kGrain / p.inputs), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) rows.round(m, x + m * ldx);
  });
  const int64_t N = p.parts * p.outputs, pieces = (N + kColumns - 1) / kColumns;
  parallel(run, pieces, max(1, kGrain / (kColumns * p.inputs)), [&](int64_t first, int64_t last) {
    const int64_t begin = first * kColumns, end = min(N, last * kColumns);
    integer_outputs<W, kParts>(p, rows, M, begin, end, y, ldy);
    finish(begin, end);
  });
}

// One product with weights of any kind.
template <typename T, typename Finish>
void any_product(Parallel run, const Product& p, const float* x, int64_t ldx, int64_t M, float* y, int64_t ldy, float* space,
                 const Finish& finish) {
  if (p.number == Number::kInt8) {
    integer_product<Int8, 1>(run, p, x, ldx, M, y, ldy, space, finish);
  } else if (p.number == Number::kInt4 && p.group < kBlock) {
    integer_product<Int4, 2>(run, p, x, ldx, M, y, ldy, space, finish);
  } else if (p.number == Number::kInt4) {
    integer_product<Int4, 1>(run, p, x, ldx, M, y, ldy, space, finish);
  } else {
    product<T>(run, p, x, ldx, M, y, ldy, finish);
  }
}

}  // namespace
}  // namespace gptneo_fast
