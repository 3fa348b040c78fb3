// Attention, without the factor 1/sqrt(D): of one query over slots as they lie, and of many over packed keys and values. A part
// of decode_lanes.cpp, as lanes.h is.
#pragma once

#include "products.h"

namespace gptneo_fast {
namespace {

// Asks memory for N vectors of L numbers that are read later, and may not be there: nothing happens then.
template <int N, int L, typename T>
INLINE void ask(const T* p) {
  constexpr int kBytes = N * L * sizeof(T);
  UNROLL for (int n = 0; n < kBytes; n += 64) __builtin_prefetch(reinterpret_cast<const char*>(p) + n, 0, 2);
}

// Scores of `count` keys of N vectors of L numbers, read in the order in which they lie: memory serves that faster. What stands
// at the same distances from `later` is asked for meanwhile, so that memory never waits for the other half of the work.
template <int N, int L, typename T>
INLINE void scores_of(const T* keys, const T* later, int64_t stride, const float* q, int64_t count, float* scores) {
  FloatsOf<L> query[N];
  UNROLL for (int n = 0; n < N; ++n) query[n] = load<L>(q + n * L);
  const auto score = [&](const T* key) INLINE_LAMBDA {
    FloatsOf<L> acc = load<L>(key) * query[0];
    UNROLL for (int n = 1; n < N; ++n) acc += load<L>(key + n * L) * query[n];
    return acc;
  };
  constexpr int kKeys = 4;  // more, and the compiler reads them out of order
  int64_t i = 0;
  for (; i + kKeys <= count; i += kKeys) {
    FloatsOf<L> acc[kKeys];
    UNROLL for (int c = 0; c < kKeys; ++c) ask<N, L>(later + (i + c) * stride);
    UNROLL for (int c = 0; c < kKeys; ++c) acc[c] = score(keys + (i + c) * stride);
    store_sums<kKeys>(acc, scores + i);
  }
  for (; i < count; ++i) scores[i] = sum(score(keys + i * stride));
}

// The same of any width.
template <int L, typename T>
INLINE void scores_of(const T* keys, int64_t stride, const float* q, int64_t D, int64_t count, float* scores) {
  for (int64_t i = 0; i < count; ++i) {
    const T* row = keys + i * stride;
    dots<1, L>(&row, q, D, scores + i);
  }
}

// out[d] += weights . values[:, d] for N vectors of L numbers, in 8 / N chains so that no addition waits for the last; `later` as
// above.
template <int N, int L, typename T>
INLINE void weigh(const T* values, const T* later, int64_t stride, const float* weights, int64_t count,
                  FloatsOf<L> (&acc)[8 / N][N]) {
  constexpr int kChains = 8 / N;
  int64_t i = 0;
  for (; i + kChains <= count; i += kChains) {
    UNROLL for (int c = 0; c < kChains; ++c) ask<N, L>(later + (i + c) * stride);
    UNROLL for (int c = 0; c < kChains; ++c)
      UNROLL for (int n = 0; n < N; ++n) acc[c][n] += load<L>(values + (i + c) * stride + n * L) * weights[i + c];
  }
  for (; i < count; ++i)
    UNROLL for (int n = 0; n < N; ++n) acc[0][n] += load<L>(values + i * stride + n * L) * weights[i];
}

// What one query sees of a ring: slots [first, first + count[0]), then [0, count[1]).
struct Seen {
  int64_t first, count[2];
};

template <int N, int L, typename T>
INLINE void values_of(const T* values, const T* later, int64_t stride, const Seen& seen, const float* weights, float scale,
                      float* out) {
  FloatsOf<L> acc[8 / N][N];
  UNROLL for (int n = 0; n < 8 / N * N; ++n) acc[n / N][n % N] = FloatsOf<L>{};
  weigh<N, L>(values + seen.first * stride, later + seen.first * stride, stride, weights, seen.count[0], acc);
  weigh<N, L>(values, later, stride, weights + seen.count[0], seen.count[1], acc);
  UNROLL for (int n = 0; n < N; ++n) {
    for (int c = 1; c < 8 / N; ++c) acc[0][n] += acc[c][n];
    write(out + n * L, acc[0][n] * scale);
  }
}

// scores[i] = e^(scores[i] - the largest), and their sum; from `count` to a multiple of the lanes they are -inf.
INLINE float softmax(float* scores, int64_t count) {
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
  return sum(total);
}

template <int N>
struct Width {
  static constexpr int kValue = N;
};

// softmax(q k^T) v over what is seen, without the factor 1/sqrt(D); zeros where that is nothing. later: the keys that are read
// next, or weights.
template <int L, typename T>
INLINE void attend(const T* keys, const T* values, const T* later, int64_t stride, const Seen& seen, const float* q, int64_t D,
                   float* scores, float* out) {
  const int64_t count = seen.count[0] + seen.count[1];
  const auto weights = [&] INLINE_LAMBDA {
    for (int64_t i = count; i < padded(count); ++i) scores[i] = -INFINITY;
    return 1.0f / softmax(scores, count);
  };
  const auto whole = [&](auto width) INLINE_LAMBDA {
    constexpr int N = decltype(width)::kValue;
    scores_of<N, L>(keys + seen.first * stride, values + seen.first * stride, stride, q, seen.count[0], scores);
    scores_of<N, L>(keys, values, stride, q, seen.count[1], scores + seen.count[0]);
    values_of<N, L>(values, later, stride, seen, scores, weights(), out);
  };
  switch (D % L ? 0 : D / L) {
    case 1: return whole(Width<1>{});
    case 2: return whole(Width<2>{});
    case 3: return whole(Width<3>{});
    case 4: return whole(Width<4>{});
    case 5: return whole(Width<5>{});
    case 6: return whole(Width<6>{});
    case 7: return whole(Width<7>{});
    case 8: return whole(Width<8>{});
  }
  scores_of<L>(keys + seen.first * stride, stride, q, D, seen.count[0], scores);
  scores_of<L>(keys, stride, q, D, seen.count[1], scores + seen.count[0]);
  const float scale = weights();
  int64_t d = 0;
  for (; d + 4 * L <= D; d += 4 * L) values_of<4, L>(values + d, later + d, stride, seen, scores, scale, out + d);
  for (; d + L <= D; d += L) values_of<1, L>(values + d, later + d, stride, seen, scores, scale, out + d);
  for (; d < D; ++d) {
    float y = 0;
    for (int64_t i = 0; i < seen.count[0]; ++i) y += widen(values[(seen.first + i) * stride + d]) * scores[i];
    for (int64_t i = 0; i < seen.count[1]; ++i) y += widen(values[i * stride + d]) * scores[seen.count[0] + i];
    out[d] = y * scale;
  }
}

constexpr int64_t kPanel = 2 * kLanes;  // columns that a tile of a product takes
constexpr int64_t kQueries = 16;        // queries whose scores exist at one time
constexpr int64_t kKeys = 256;          // keys whose values stay in the first-level cache
constexpr int64_t kFew = 8;             // queries for which packing does not pay

constexpr int64_t panels(int64_t n) { return (n + kPanel - 1) / kPanel; }

// out[r] (+)= a[r] b for R rows of a; b: [K, kPanel], dense.
template <int R>
INLINE void tile(const float* a, int64_t lda, const float* b, int64_t K, float* out, int64_t ldo, bool adds) {
  Floats acc[R][2];
  UNROLL for (int i = 0; i < 2 * R; ++i)
    acc[i / 2][i % 2] = adds ? load<kLanes>(out + i / 2 * ldo + i % 2 * kLanes) : Floats{};
  for (int64_t k = 0; k < K; ++k) {
    const Floats left = load<kLanes>(b + k * kPanel), right = load<kLanes>(b + k * kPanel + kLanes);
    UNROLL for (int r = 0; r < R; ++r) {
      const float value = a[r * lda + k];
      acc[r][0] += left * value;
      acc[r][1] += right * value;
    }
  }
  UNROLL for (int i = 0; i < 2 * R; ++i) write(out + i / 2 * ldo + i % 2 * kLanes, acc[i / 2][i % 2]);
}

// out [M, count * kPanel] (+)= a [M, K] times `count` panels of b, which are `far` apart.
inline void multiply(const float* a, int64_t lda, int64_t M, const float* b, int64_t far, int64_t count, int64_t K, float* out,
                     int64_t ldo, bool adds) {
  for (int64_t p = 0; p < count; ++p, b += far, out += kPanel) {
    int64_t m = 0;
    for (; m + 4 <= M; m += 4) tile<4>(a + m * lda, lda, b, K, out + m * ldo, ldo, adds);
    for (; m < M; ++m) tile<1>(a + m * lda, lda, b, K, out + m * ldo, ldo, adds);
  }
}

// The keys of a row of the batch in order of age: `past` of them in slots, from token `first` on, then columns from `column`.
struct Keys {
  int64_t first, past, column, count;
};

inline Keys keys_of(const Attention& a, int64_t b) {
  const int64_t start = a.starts ? a.starts[b] : 0, held = a.lengths ? a.lengths[b] : 0;
  if (!a.k.data) {  // the new ones are in slots, too
    const int64_t all = held + a.T - start, past = min(all, a.R);
    return {all - past, past, 0, past};
  }
  const int64_t past = min(held, a.R), end = max(start, a.ends ? min(a.ends[b], a.T) : a.T);
  return {held - past, past, start, past + end - start};
}

// What column i of row b sees: [begin, end) of its keys.
struct Range {
  int64_t begin, end;

  bool empty() const { return begin >= end; }
};

inline Range range_of(const Attention& a, const Keys& keys, int64_t b, int64_t i) {
  const int64_t place = (a.lengths ? a.lengths[b] : 0) + i - (a.starts ? a.starts[b] : 0) - keys.first;
  return {a.window ? max(0, place - a.window + 1) : 0, min(place + 1, keys.count)};
}

template <typename T>
INLINE const T* token_of(const Heads& heads, int64_t b, int64_t h, int64_t token) {
  return static_cast<const T*>(heads.data) + b * heads.batch + h * heads.head + token * heads.token;
}

// Floats that one head takes: keys and values in panels, then queries, scores and results of a tile.
inline int64_t head_floats(const Attention& a) {
  const int64_t S = panels((a.keys.data ? a.R : 0) + (a.k.data ? a.T : 0)) * kPanel, D = panels(a.D) * kPanel;
  return S * (a.D + D) + kQueries * (padded(a.D) + S + D);
}

// The keys [S, D] of one head as panels [., D, kPanel], its values as panels [., S, kPanel]; zeros beyond them.
template <typename T>
void pack(const Attention& a, const Keys& all, int64_t b, int64_t h, float* keys, float* values, int64_t S) {
  const int64_t D = a.D;
  memset(keys, 0, S * D * sizeof(float));
  memset(values, 0, S * panels(D) * kPanel * sizeof(float));
  for (int64_t s = 0; s < all.count; ++s) {
    const bool old = s < all.past;
    const int64_t token = old ? (all.first + s) % a.R : all.column + s - all.past;
    const T *k = token_of<T>(old ? a.keys : a.k, b, h, token), *v = token_of<T>(old ? a.values : a.v, b, h, token);
    float* column = keys + s / kPanel * kPanel * D + s % kPanel;
    for (int64_t d = 0; d < D; ++d) column[d * kPanel] = widen(k[d]);
    for (int64_t d = 0; d < D; d += kPanel) {
      float* row = values + d * S + s * kPanel;
      const int64_t count = min(kPanel, D - d);
      for (int64_t i = 0; i < count; ++i) row[i] = widen(v[d + i]);
    }
  }
}

// One head, its keys and values packed, in tiles of queries.
template <typename T>
void many_queries(const Attention& a, int64_t b, int64_t h, float* space) {
  const Keys all = keys_of(a, b);
  const int64_t D = a.D, wide = panels(D) * kPanel, S = panels(all.count) * kPanel, ldq = padded(D);
  float *keys = space, *values = keys + S * D, *q = values + S * wide, *y = q + kQueries * ldq, *scores = y + kQueries * wide;
  pack<T>(a, all, b, h, keys, values, S);
  for (int64_t first = 0; first < a.T; first += kQueries) {
    const int64_t M = min(kQueries, a.T - first);
    Range seen[kQueries];
    int64_t begin = S, end = 0;
    for (int64_t m = 0; m < M; ++m) {
      seen[m] = range_of(a, all, b, first + m);
      if (seen[m].empty()) continue;
      begin = min(begin, seen[m].begin), end = max(end, seen[m].end);
    }
    T* out = static_cast<T*>(a.out) + ((b * a.T + first) * a.H + h) * D;
    if (begin >= end) {
      for (int64_t m = 0; m < M; ++m) memset(out + m * a.H * D, 0, D * sizeof(T));
      continue;
    }
    begin = begin / kPanel * kPanel;
    const int64_t count = panels(end - begin), width = count * kPanel;
    for (int64_t m = 0; m < M; ++m) {
      const T* from = token_of<T>(a.q, b, h, first + m);
      for (int64_t d = 0; d < D; ++d) q[m * ldq + d] = widen(from[d]);
    }
    multiply(q, ldq, M, keys + begin * D, kPanel * D, count, D, scores, width, false);
    float scale[kQueries];
    for (int64_t m = 0; m < M; ++m) {
      float* row = scores + m * width;
      if (seen[m].empty()) {
        memset(row, 0, width * sizeof(float));
        continue;
      }
      for (int64_t i = 0; i < seen[m].begin - begin; ++i) row[i] = -INFINITY;
      for (int64_t i = seen[m].end - begin; i < width; ++i) row[i] = -INFINITY;
      scale[m] = 1.0f / softmax(row, width);
    }
    for (int64_t k = 0; k < width; k += kKeys)
      multiply(scores + k, width, M, values + (begin + k) * kPanel, S * kPanel, panels(D), min(kKeys, width - k), y, wide, k > 0);
    for (int64_t m = 0; m < M; ++m) {
      for (int64_t d = 0; d < D; ++d) y[m * wide + d] = seen[m].empty() ? 0.0f : y[m * wide + d] * scale[m];
      store(y + m * wide, out + m * a.H * D, D);
    }
  }
}

// One head of few queries, whose keys and values are all in slots, where they are read.
template <typename T>
void few_queries(const Attention& a, int64_t b, int64_t h, float* space) {
  const Keys all = keys_of(a, b);
  const int64_t D = a.D;
  float *q = space, *y = q + padded(D) + kPad, *scores = y + padded(D);
  memset(q, 0, (padded(D) + kPad) * sizeof(float));
  const T *keys = token_of<T>(a.keys, b, h, 0), *values = token_of<T>(a.values, b, h, 0);
  for (int64_t t = 0; t < a.T; ++t) {
    T* out = static_cast<T*>(a.out) + ((b * a.T + t) * a.H + h) * D;
    const Range range = range_of(a, all, b, t);
    if (range.empty()) {
      memset(out, 0, D * sizeof(T));
      continue;
    }
    const int64_t count = range.end - range.begin, slot = (all.first + range.begin) % a.R;
    const Seen seen = {slot, {min(count, a.R - slot), max(0, count - (a.R - slot))}};
    const T* from = token_of<T>(a.q, b, h, t);
    for (int64_t d = 0; d < D; ++d) q[d] = widen(from[d]);
    if (D % kLanes == 0) {
      attend<kLanes>(keys, values, keys + a.keys.head, a.keys.token, seen, q, D, scores, y);
    } else {
      attend<4>(keys, values, keys + a.keys.head, a.keys.token, seen, q, D, scores, y);
    }
    store(y, out, D);
  }
}

template <typename T>
void attention(const Attention& a, Parallel run, Workspace workspace) {
  const bool few = !a.k.data && a.T <= kFew;
  const int64_t work = max(1, a.T * ((a.keys.data ? a.R : 0) + a.T) * a.D);
  parallel(run, a.B * a.H, max(1, kGrain / work), [&](int64_t begin, int64_t end) {
    float* space = workspace(head_floats(a));
    for (int64_t i = begin; i < end; ++i) (few ? few_queries<T> : many_queries<T>)(a, i / a.H, i % a.H, space);
  });
}

}  // namespace
}  // namespace gptneo_fast
