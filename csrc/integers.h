// Products with weights in 8 and 4 bits. A part of decode_lanes.cpp.
//
// The rows of x are rounded to 16 bits first, each block with a scale of its own: an error of 2^-16 of the largest of
// them, where bfloat16 would err by 2^-9 of each. Then 64 products are one exact sum of integers; in floats they cost twice as
// much as memory has time for. With x in 8 bits tokens would be others than those of the weights. A lane is a row of weights, so
// that what a block has once (the way to floats, scales) is paid for a vector of rows, and nothing is summed over lanes. What is
// summed in float32, block after block, knows nothing of how many rows of x there are or which thread has them.
#pragma once

#include "packed.h"
#include "products.h"

namespace gptneo_fast {
namespace {

constexpr float kLargest = 32639;  // of x in 16 bits: the higher byte of one that is rounded to 256 is at most 127
constexpr int64_t kBlocks = 16;    // that many rows of x go over while they are in the first-level cache
constexpr int kTiles = kLanes == 16 ? 2 : 1;  // that share what is read of x
constexpr int kVectorsOfTile = kTile / kLanes;

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

template <int R>
struct Rows {  // how many, for functions that are given to functions
  constexpr int operator()() const { return R; }
};

// The four bytes at p in every lane.
INLINE Ints everywhere(const int16_t* p) { return Ints{} + read<int32_t>(p); }

// Sums over a block of the products of bytes of weights, which have no sign, and of x. kSums of them hold what the words of a
// block give: numbers of 4 bits by their place, where 16 bits would not take all.
#if defined(__AVX512VNNI__)
struct Bytes {
  Ints sum = {};
  static constexpr int kSums = 1;
  static constexpr bool kTakeInt8 = true;

  INLINE void add(Words weights, Ints x) {
    sum = same_bits<Ints>(
        _mm512_dpbusd_epi32(same_bits<__m512i>(sum), same_bits<__m512i>(weights), same_bits<__m512i>(x)));
  }
  INLINE Ints whole() const { return sum; }
};
#elif defined(__AVX2__)
struct Bytes {
  Shorts sum = {};
  static constexpr int kSums = 2;  // of 16 products of at most 15 * 128
  static constexpr bool kTakeInt8 = false;

  INLINE void add(Words weights, Ints x) {
#if defined(__AVX512BW__)
    sum += same_bits<Shorts>(_mm512_maddubs_epi16(same_bits<__m512i>(weights), same_bits<__m512i>(x)));
#else
    sum += same_bits<Shorts>(_mm256_maddubs_epi16(same_bits<__m256i>(weights), same_bits<__m256i>(x)));
#endif
  }
  INLINE Ints whole() const { return add_products(Ints{}, sum, Shorts{} + 1); }
};
#endif

// Whether x is taken in its two bytes, and how many rows of it weights are read for.
#if defined(__AVX2__)
template <typename W, int kParts>
constexpr bool kSplit = kParts == 1 && (W::kGrouped || Bytes::kTakeInt8);
template <typename W, int kParts>
constexpr int kRows = (kLanes == 16 ? 4 : 2) / (kSplit<W, kParts> ? Bytes::kSums : 1);
#else
template <typename W, int kParts>
constexpr bool kSplit = false;
template <typename W, int kParts>
constexpr int kRows = 2;
#endif

// Rows of x in 16 bits, for weights of which a block has a scale, or two.
template <typename W, int kParts>
struct Rounded {
  float* scales;     // [M, blocks]
  int32_t* shifts;   // [M, blocks, kParts]: what weights that are too large by kZero ask for
  int16_t* numbers;  // [M, blocks, 64], in the order of W's words, or their higher bytes and then their lower ones
  int64_t K, blocks;
  static constexpr int kZero = kSplit<W, kParts> ? W::kZeroOfBytes : W::kZero;

  Rounded(float* space, int64_t M, int64_t inputs) : scales(space), K(inputs), blocks(blocks_of(inputs)) {
    shifts = reinterpret_cast<int32_t*>(scales + M * blocks);
    numbers = reinterpret_cast<int16_t*>(shifts + M * blocks * kParts);
  }

  void round(int64_t m, const float* x) const {
    for (int64_t b = 0; b < blocks; ++b) {
      float spare[kBlock] = {};
      const float* from = x + b * kBlock;
      if (const int64_t left = K - b * kBlock; left < kBlock) {
        memcpy(spare, from, left * sizeof(float));
        from = spare;
      }
      Ints most = {};  // of the bits without the sign, which are in the order of the sizes
      for (int64_t k = 0; k < kBlock; k += kLanes) {
        const Ints size = read<Ints>(from + k) & 0x7fffffff;
        most = size > most ? size : most;
      }
      const float size = same_bits<float>(largest(most));
      const bool some = size > 1e-30f && size < INFINITY;
      const int64_t at = m * blocks + b;
      scales[at] = some ? size * (1 / kLargest) : (size - size) * 0.0f;  // NaN where a number is not finite
      const float inverse = some ? kLargest / size : 0.0f;
      int16_t* to = numbers + at * kBlock;
      for (int part = 0; part < kParts; ++part) {
        Floats total = {};  // whole numbers below 2^24
        for (int64_t k = part * kBlock / kParts; k < (part + 1) * kBlock / kParts; k += kLanes) {
          const Floats value = some ? load<kLanes>(from + k) * inverse : Floats{};
          const Floats shifted = value + 12582912.0f;  // 1.5 * 2^23: the integer nearest to it in the lowest bits
          total += shifted - 12582912.0f;
          typedef int16_t Some __attribute__((vector_size(2 * kLanes)));
          const Some narrow = __builtin_convertvector(same_bits<Ints>(shifted) - 0x4b400000, Some);
          memcpy(to + k, &narrow, sizeof(narrow));
        }
        shifts[at * kParts + part] = -kZero * static_cast<int32_t>(sum(total));
      }
      kSplit<W, kParts> ? W::split(to) : W::order(to);
    }
  }
};

// total[part][r][v] += of a block the products of vectors v of rows of weights, whose words stand kTile apart, and of R rows of x.
template <typename W, int R, int V, int kParts>
INLINE void add_block(const uint32_t* const* words, const int16_t* const* x, Ints (*total)[R][V]) {
#if defined(__AVX2__)
  if constexpr (kSplit<W, kParts>) {
    constexpr int kPlaces = W::kPlaces / 2, kSums = kPlaces < Bytes::kSums ? kPlaces : Bytes::kSums;
    Bytes high[kSums][R][V], low[kSums][R][V];
    ROLL for (int i = 0; i < W::kWords; ++i) {
      UNROLL for (int p = 0; p < kPlaces; ++p) {
        Words weights[V];
        UNROLL for (int v = 0; v < V; ++v) weights[v] = W::bytes(read<Words>(words[v] + i * kTile), p);
        UNROLL for (int r = 0; r < R; ++r) {
          const int16_t* bytes = x[r] + 2 * (W::kWords * p + i);
          const Ints upper = everywhere(bytes), lower = everywhere(bytes + kBlock / 2);
          UNROLL for (int v = 0; v < V; ++v) high[p % kSums][r][v].add(weights[v], upper);
          UNROLL for (int v = 0; v < V; ++v) low[p % kSums][r][v].add(weights[v], lower);
        }
      }
    }
    UNROLL for (int i = 0; i < kSums * R * V; ++i) {
      const int r = i / V % R, v = i % V;
      total[0][r][v] += (high[i / V / R][r][v].whole() << 8) + low[i / V / R][r][v].whole();
    }
    return;
  }
#endif
  ROLL for (int i = 0; i < W::kWords; ++i) {
    UNROLL for (int p = 0; p < W::kPlaces; ++p) {
      Shorts numbers[V];
      UNROLL for (int v = 0; v < V; ++v) numbers[v] = W::pairs(read<Words>(words[v] + i * kTile), p);
      UNROLL for (int r = 0; r < R; ++r) {
        const Shorts pair = same_bits<Shorts>(everywhere(x[r] + 2 * W::pair(i, p)));
        UNROLL for (int v = 0; v < V; ++v) {
          Ints& sum = total[p * kParts / W::kPlaces][r][v];
          sum = add_products(sum, numbers[v], pair);
        }
      }
    }
  }
}

// sum[r] += the products of blocks [first, last) of the rows of N tiles and of R rows of x from m on.
template <typename W, int R, int N, int kParts>
INLINE void gather_blocks(const Tile* tiles, const Rounded<W, kParts>& x, int64_t m, int64_t first, int64_t last, int shift,
                          Floats (*sum)[N * kVectorsOfTile]) {
  constexpr int V = N * kVectorsOfTile;
  for (int64_t b = first; b < last; ++b) {
    uint32_t spare[N][W::kWords * kTile];
    BFloat16 own[N][kParts][kTile];
    const uint32_t* words[V];
    const BFloat16* scales[V][kParts];
    UNROLL for (int v = 0; v < V; ++v) {
      const int n = v / kVectorsOfTile, lane = v % kVectorsOfTile * kLanes;
      words[v] = tiles[n].block<W>(b, spare[n]) + lane;
      if constexpr (W::kGrouped)
        UNROLL for (int part = 0; part < kParts; ++part)
          scales[v][part] = tiles[n].scales_of((kParts * b + part) >> shift, own[n][part]) + lane;
    }
    const int16_t* numbers[R];
    Ints total[kParts][R][V];
    UNROLL for (int r = 0; r < R; ++r) {
      const int64_t at = (m + r) * x.blocks + b;
      numbers[r] = x.numbers + at * kBlock;
      UNROLL for (int i = 0; i < kParts * V; ++i) total[i / V][r][i % V] = Ints{} + x.shifts[at * kParts + i / V];
    }
    add_block<W, R, V, kParts>(words, numbers, total);
    UNROLL for (int r = 0; r < R; ++r) {
      const float scale = x.scales[(m + r) * x.blocks + b];
      UNROLL for (int i = 0; i < kParts * V; ++i) {
        const Floats product = __builtin_convertvector(total[i / V][r][i % V], Floats);
        if constexpr (W::kGrouped) sum[r][i % V] += product * (load<kLanes>(scales[i % V][i / V]) * scale);
        else sum[r][i % V] += product * scale;
      }
    }
  }
}

// A tile's outputs for one row of x, of rows with a scale of their own times that.
template <typename W>
INLINE void write_outputs(const Tile& tile, const Floats* sum, float* y) {
  float out[kTile];
  float* to = tile.width == kTile ? y : out;
  if constexpr (!W::kGrouped) {
    float own[kTile];
    const float* scales = tile.rows(static_cast<const float*>(tile.scales), own);
    UNROLL for (int v = 0; v < kVectorsOfTile; ++v) write(to + v * kLanes, sum[v] * load<kLanes>(scales + v * kLanes));
  } else {
    UNROLL for (int v = 0; v < kVectorsOfTile; ++v) write(to + v * kLanes, sum[v]);
  }
  if (to == out) memcpy(y, out, tile.width * sizeof(float));
}

// Outputs of N tiles, which are `far` apart, for M rows of x; many go over some blocks after the other.
template <typename W, int N, int kParts>
INLINE void tile_outputs(const Tile* tiles, const Rounded<W, kParts>& x, int64_t M, int shift, float* y, int64_t far,
                         int64_t ldy) {
  constexpr int V = N * kVectorsOfTile;
  const auto write_row = [&](const Floats* sum, float* to) INLINE_LAMBDA {
    UNROLL for (int n = 0; n < N; ++n) write_outputs<W>(tiles[n], sum + n * kVectorsOfTile, to + n * far);
  };
  if (M == 1) {
    Floats sum[1][V];
    UNROLL for (int v = 0; v < V; ++v) sum[0][v] = Floats{};
    gather_blocks<W, 1, N, kParts>(tiles, x, 0, 0, x.blocks, shift, sum);
    return write_row(sum[0], y);
  }
  Floats sum[kManyRows][V];
  memset(sum, 0, M * sizeof(sum[0]));
  for (int64_t first = 0; first < x.blocks; first += kBlocks) {
    const auto gather = [&](auto rows, int64_t m) INLINE_LAMBDA {
      Floats some[rows()][V];
      memcpy(some, sum[m], sizeof(some));
      gather_blocks<W, rows(), N, kParts>(tiles, x, m, first, min(x.blocks, first + kBlocks), shift, some);
      memcpy(sum[m], some, sizeof(some));
    };
    int64_t m = 0;
    constexpr int R = kRows<W, kParts>;
    for (; m + R <= M; m += R) gather(Rows<R>(), m);
    for (; m < M; ++m) gather(Rows<1>(), m);
  }
  for (int64_t m = 0; m < M; ++m) write_row(sum[m], y + m * ldy);
}

// Tiles [begin, end) of one of a product's weights. One function for all products: compiled once, and not for each of them.
template <typename W, int kParts>
__attribute__((noinline)) void integer_outputs(const Product& p, int64_t part, int64_t begin, int64_t end,
                                               const Rounded<W, kParts>& x, int64_t M, float* y, int64_t ldy) {
  const int shift = p.groups < p.row_blocks ? 1 : 0;  // of blocks that share scales, as a power of two
  int64_t i = begin;
  if constexpr (kTiles > 1) {  // far apart, which memory serves faster than neighbours
    const int64_t far = (min(end, p.outputs / kTile) - begin) / kTiles;
    for (; i < begin + far; ++i) {
      Tile tiles[kTiles];
      UNROLL for (int n = 0; n < kTiles; ++n) tiles[n] = tile_of<W>(p, part, i + n * far);
      tile_outputs<W, kTiles, kParts>(tiles, x, M, shift, y + (i - begin) * kTile, far * kTile, ldy);
    }
    i = begin + kTiles * far;
  }
  for (; i < end; ++i) {
    const Tile tile = tile_of<W>(p, part, i);
    tile_outputs<W, 1, kParts>(&tile, x, M, shift, y + (i - begin) * kTile, 0, ldy);
  }
}

// As `product`, for weights in few bits; `space` is for the rows of x in 16 bits.
template <typename W, int kParts, typename Finish>
void integer_product(Parallel run, const Product& p, const float* x, int64_t ldx, int64_t M, float* y, int64_t ldy, float* space,
                     const Finish& finish) {
  const Rounded<W, kParts> rows(space, M, p.inputs);
  parallel(run, M, max(1, kGrain / p.inputs), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) rows.round(m, x + m * ldx);
  });
  const int64_t tiles = (p.outputs + kTile - 1) / kTile;  // of a part
  parallel(run, p.parts * tiles, max(1, kGrain / (kTile * p.inputs)), [&](int64_t first, int64_t last) {
    for (int64_t part = first / tiles; part * tiles < last; ++part) {
      const int64_t begin = max(0, first - part * tiles), end = min(tiles, last - part * tiles);
      float* to = y + part * p.outputs + begin * kTile;
      integer_outputs<W, kParts>(p, part, begin, end, rows, M, to, ldy);
      finish(part * p.outputs + begin * kTile, part * p.outputs + min(p.outputs, end * kTile));
    }
  });
}

// One product with weights of any kind.
template <typename T, typename Finish>
void any_product(Parallel run, const Product& p, const float* x, int64_t ldx, int64_t M, float* y, int64_t ldy, float* space,
                 const Finish& finish) {
  if (p.number == Number::kInt8) {
    integer_product<Int8, 1>(run, p, x, ldx, M, y, ldy, space, finish);
  } else if (p.number == Number::kInt4 && p.groups > p.row_blocks) {
    integer_product<Int4, 2>(run, p, x, ldx, M, y, ldy, space, finish);
  } else if (p.number == Number::kInt4) {
    integer_product<Int4, 1>(run, p, x, ldx, M, y, ldy, space, finish);
  } else {
    product<T>(run, p, x, ldx, M, y, ldy, finish);
  }
}

}  // namespace
}  // namespace gptneo_fast
