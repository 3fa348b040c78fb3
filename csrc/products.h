// Products of a few rows with weights that are read once, at the rate of the memory. A part of decode_lanes.cpp, as lanes.h is.
//
// All sums are float32 and go lane by lane, a row's numbers in order, then lanes in pairs. The order knows nothing of how
// many rows there are or which thread has them, so a row's bits do not depend on its company.
#pragma once

#include "decode.h"
#include "lanes.h"

namespace gptneo_fast {
namespace {

constexpr int64_t kChunk = 256;      // numbers of a row that many rows of x go over while all are in the first-level cache
constexpr int kTogether = kLanes == 16 ? 4 : 3;  // rows of x that a weight is read for: with 4 weights, the registers
constexpr int64_t kAhead = 256;      // bytes; of shorter rows asking ahead costs more than it brings
constexpr int64_t kFirstLevel = 32 << 10;  // bytes
constexpr int64_t kGrain = 1 << 15;  // weights that are worth a thread
constexpr int64_t kColumns = 16;     // outputs that a thread takes at least: whole cache lines of a float32 result

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

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
  const auto add = [&](int64_t k) INLINE_LAMBDA {
    const FloatsOf<L> value = load<L>(x + k);
    UNROLL for (int n = 0; n < N; ++n) acc[n] += load<L>(w[n] + k) * value;
  };
  int64_t k = 0;
  if constexpr (L == 16) {  // by cache lines, of which some are asked for ahead, and not kept
    constexpr int kLine = 64 / sizeof(T);
    for (; K >= kAhead && k + kLine <= K; k += kLine) {
      UNROLL for (int n = 0; n < N; ++n) __builtin_prefetch(reinterpret_cast<const char*>(w[n] + k) + kAhead, 0, 0);
      UNROLL for (int i = 0; i < kLine; i += L) add(k + i);
    }
  }
  for (; k + L <= K; k += L) add(k);
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

// acc[m][n] += w[n] . x[m] for all M rows of x.
template <int N, typename T>
INLINE void gather_all(const T* const* w, const float* x, int64_t ldx, int64_t M, int64_t size, Floats (*acc)[N]) {
  int64_t m = 0;
  for (; m + kTogether <= M; m += kTogether) gather<N, kTogether>(w, x + m * ldx, ldx, size, acc + m);
  if constexpr (kTogether > 2)
    for (; m + 2 <= M; m += 2) gather<N, 2>(w, x + m * ldx, ldx, size, acc + m);
  for (; m < M; ++m) gather<N, 1>(w, x + m * ldx, ldx, size, acc + m);
}

// The same as `dots` for M rows of x, in pieces that stay in the first-level cache; out[m * N + n].
template <int N, typename T>
INLINE void many_dots(const T* const* w, const float* x, int64_t ldx, int64_t M, int64_t K, float* out) {
  Floats acc[kMaxRows][N];
  memset(acc, 0, M * sizeof(acc[0]));
  for (int64_t first = 0; first < K; first += kChunk) {
    const int64_t size = min(kChunk, K - first);
    const T* piece[N];
    for (int n = 0; n < N; ++n) piece[n] = w[n] + first;
    if (sizeof(T) < sizeof(float) && M > 2 * kTogether) {  // widened once, and not for each few rows of x
      float wide[N][kChunk];
      const float* rows[N];
      for (int n = 0; n < N; ++n) {
        int64_t k = 0;
        for (; k + kLanes <= size; k += kLanes) write(wide[n] + k, load<kLanes>(piece[n] + k));
        if (k < size) write(wide[n] + k, load_end<kLanes>(piece[n] + k, size - k));
        rows[n] = wide[n];
      }
      gather_all<N>(rows, x + first, ldx, M, size, acc);
    } else {
      gather_all<N>(piece, x + first, ldx, M, size, acc);
    }
  }
  for (int64_t m = 0; m < M; ++m) store_sums<N>(acc[m], out + m * N);
}

// Outputs [begin, end) of M rows: y[m * ldy + n]. The weights are read as N streams far apart, which memory serves faster.
template <int N, typename T>
INLINE void streams(const Product& p, const float* x, int64_t ldx, int64_t M, int64_t begin, int64_t end, float* y,
                    int64_t ldy) {
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
void product(Parallel run, const Product& p, const float* x, int64_t ldx, int64_t M, float* y, int64_t ldy,
             const Finish& finish) {
  const int64_t N = p.parts * p.outputs, pieces = (N + kColumns - 1) / kColumns;
  parallel(run, pieces, max(1, kGrain / (kColumns * p.inputs)), [&](int64_t first, int64_t last) {
    const int64_t begin = first * kColumns, end = min(N, last * kColumns);
    int rows = 4;
    if constexpr (kLanes == 16 && sizeof(T) < sizeof(float)) {  // as many as leave x in the first-level cache, else more
      const auto fits = [&](int n) { return p.inputs * (sizeof(float) + n * sizeof(T)) <= kFirstLevel; };
      if (M == 1 && !fits(4)) rows = fits(2) ? 2 : 8;
      if (rows == 2) streams<2, T>(p, x, ldx, M, begin, end, y, ldy);
      if (rows == 8) streams<8, T>(p, x, ldx, M, begin, end, y, ldy);
    }
    if (rows == 4) streams<4, T>(p, x, ldx, M, begin, end, y, ldy);
    finish(begin, end);
  });
}

}  // namespace
}  // namespace gptneo_fast
