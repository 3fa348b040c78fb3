// A step of decoding, linear layers of a few rows, attention; compiled once for each instruction set (setup.py).
#include "attention.h"
#include "draw_lanes.h"
#include "integers.h"

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

namespace gptneo_fast {
namespace {

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

// y += x, columns [begin, end).
template <typename T>
void add_numbers(float* y, const T* x, int64_t begin, int64_t end) {
  int64_t n = begin;
  for (; n + kLanes <= end; n += kLanes) write(y + n, load<kLanes>(y + n) + load<kLanes>(x + n));
  for (; n < end; ++n) y[n] += widen(x[n]);
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

// Heads [begin, end) of the B * H in all: their new keys and values into the slots, then attention of their T queries.
template <typename T>
void heads(const Step& s, const Layer& layer, const float* qkv, int64_t ld, float* y, int64_t ldy, float* scores, int64_t begin,
           int64_t end) {
  const int64_t C = s.C(), D = s.D;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / s.H, h = i % s.H, start = s.starts ? s.starts[b] : 0, held = s.lengths[b];
    T* keys = reinterpret_cast<T*>(layer.keys) + b * layer.batch + h * layer.head;
    T* values = reinterpret_cast<T*>(layer.values) + b * layer.batch + h * layer.head;
    const T* later = i + 1 < end ? keys + layer.head : static_cast<const T*>(layer.out_proj.weight[0]);
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
      float query[kMaxHeadDim];  // goes on with zeros
      const float* q = rows + t * ld;
      if (D % kPad) {
        memset(query + D / kPad * kPad, 0, kPad * sizeof(float));
        memcpy(query, q, D * sizeof(float));
        q = query;
      }
      float* own = scores + i * padded(layer.R);
      if (D % kLanes == 0) {
        attend<kLanes>(keys, values, later, layer.token, seen, q, D, own, out);
      } else {
        attend<4>(keys, values, later, layer.token, seen, q, D, own, out);
      }
    }
  }
}

// out[c] = row `id` of a token embedding.
template <typename T>
void token_row(const Product& wte, int64_t id, float* out) {
  if (wte.number == Number::kInt8) return dequantize_row<Int8>(wte, id, out);
  if (wte.number == Number::kInt4) return dequantize_row<Int4>(wte, id, out);
  const T* row = row_of<T>(wte, id);
  for (int64_t c = 0; c < wte.inputs; ++c) out[c] = widen(row[c]);
}

// `spare`: C floats.
template <typename T>
void embed(const Step& s, float* x, int64_t ld, float* spare) {
  const int64_t C = s.C();
  const T* wpe = static_cast<const T*>(s.wpe);
  for (int64_t m = 0; m < s.B * s.T; ++m, x += ld) {
    if (!s.ids) {
      const T* from = static_cast<const T*>(s.x) + m * C;
      for (int64_t c = 0; c < C; ++c) x[c] = widen(from[c]);
      continue;
    }
    const T* place = wpe + s.positions[s.position_rows == 1 ? m % s.T : m] * C;
    token_row<T>(s.wte, s.ids[m], x);
    for (int64_t c = 0; c < C; ++c) x[c] += widen(place[c]);
    if (!s.types) continue;
    token_row<T>(s.wte, s.types[m], spare);
    for (int64_t c = 0; c < C; ++c) x[c] += spare[c];
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

constexpr int64_t kSummed = 1 << 10;  // numbers that are added in float32 before the sum goes on in float64

// A piece's logits from v on, -inf behind its end.
INLINE Floats some_of(const Piece& p, int64_t v) {
  if (v + kLanes <= p.size) return load<kLanes>(p.at + v);
  float part[kLanes];
  for (int64_t l = 0; l < kLanes; ++l) part[l] = v + l < p.size ? p.at[v + l] : -INFINITY;
  return load<kLanes>(part);
}

void statistics(const Piece* pieces, int64_t count, int64_t token, float* own, int64_t* rank, float* entropy, float* variance) {
  int64_t home = 0, place = token;  // of the token's logit: its piece, and where in it
  while (place >= pieces[home].size) place -= pieces[home++].size;
  const float value = pieces[home].at[place];
  Floats best = Floats{} - INFINITY;
  float top = -INFINITY;
  for (const Piece* p = pieces; p < pieces + count; ++p) {
    for (int64_t v = 0; v < p->size; v += kLanes) {
      const Floats x = some_of(*p, v);
      best = choose(x > best, x, best);
    }
  }
  for (int l = 0; l < kLanes; ++l) top = best[l] > top ? best[l] : top;
  // Squares are summed about a number near the mean, that of the first few: about 0 little of their sum would be the variance.
  float weight = 0, moment = 0;
  int64_t few = kSummed;
  for (const Piece* p = pieces; p < pieces + count && few > 0; few -= p++->size)
    for (int64_t v = 0; v < min(p->size, few); v += kLanes) {
      const Floats d = some_of(*p, v) - top, e = exponential(d);
      weight += sum(e), moment += sum(choose(e > 0.0f, d * e, Floats{}));
    }
  const float centre = weight > 0 && moment > -INFINITY ? moment / weight : 0;
  double total = 0, first = 0, second = 0;  // of e^d, g e^d and g^2 e^d, d = logit - top and g = d - centre
  int64_t above = 0;
  for (const Piece* p = pieces; p < pieces + count; ++p)
    for (int64_t begin = 0; begin < p->size; begin += kSummed) {
      const int64_t end = min(p->size, begin + kSummed);
      Floats t = {}, f = {}, s = {};
      Ints a = {};
      for (int64_t v = begin; v < end; v += kLanes) {
        const Floats x = some_of(*p, v), d = x - top, e = exponential(d);
        const Floats g = d - centre, ge = choose(e > 0.0f, g * e, choose(e == e, Floats{}, e));  // -inf times 0 is nothing
        t += e;
        f += ge;
        s += choose(e > 0.0f, g * ge, ge);
        a -= x > value;
      }
      total += sum(t), first += sum(f), second += sum(s);
      for (int l = 0; l < kLanes; ++l) above += a[l];
    }
  for (int64_t i = 0; i <= home; ++i)
    for (int64_t v = 0; v < (i < home ? pieces[i].size : place); ++v) above += pieces[i].at[v] == value;
  const double shift = first / total;
  *own = static_cast<float>(value - top - log(total));
  *rank = above;
  *entropy = static_cast<float>(log(total) - (centre + shift));
  *variance = static_cast<float>(second / total - shift * shift);
}

template <typename T>
void decode(const Step& s, Parallel run, float* workspace) {
  const int64_t M = s.B * s.T, C = s.C(), ld = padded(C);
  const int64_t ldi = padded(inner_width(s));
  float* x = workspace;      // [M, ld] the residual stream
  float* y = x + M * ld;     // [M, ld] what a product reads
  float* z = y + M * ld;     // [M, ld] what it gives
  float* wide = z + M * ld;  // [M, ldi] q, k and v; the inner rows of the MLP
  float* scores = wide + M * ldi;
  int64_t slots = 0;
  for (int64_t i = 0; i < s.L; ++i) slots = max(slots, s.layers[i].R);
  float* rounded = scores + s.B * s.H * padded(slots);
  for (int64_t m = 0; m < M; ++m)
    for (int64_t c = C; c < ld; ++c) x[m * ld + c] = y[m * ld + c] = 0;
  const auto each = [M](const auto& of_row) {
    for (int64_t m = 0; m < M; ++m) of_row(m);
  };
  embed<T>(s, x, ld, z);
  for (int64_t i = 0; i < s.L; ++i) {
    const Layer& layer = s.layers[i];
    const auto add_to_x = [&](const Product& p) {
      return [&, bias = static_cast<const T*>(p.bias)](int64_t begin, int64_t end) {
        each([&](int64_t m) {
          add_numbers(z + m * ld, bias, begin, end);
          add_numbers(x + m * ld, z + m * ld, begin, end);
        });
      };
    };
    layer_norm<T>(layer.ln_1, x, y, C, ld, M);
    any_product<T>(run, layer.qkv, y, ld, M, wide, ldi, rounded, [](int64_t, int64_t) {});
    const int64_t sight = layer.window ? min(layer.window, layer.R) : layer.R;
    parallel(run, s.B * s.H, max(1, kGrain / (2 * sight * s.D * s.T)), [&](int64_t begin, int64_t end) {
      heads<T>(s, layer, wide, ldi, y, ld, scores, begin, end);
    });
    any_product<T>(run, layer.out_proj, y, ld, M, z, ld, rounded, add_to_x(layer.out_proj));
    layer_norm<T>(layer.ln_2, x, y, C, ld, M);
    const int64_t F = layer.c_fc.outputs;
    any_product<T>(run, layer.c_fc, y, ld, M, wide, ldi, rounded, [&](int64_t begin, int64_t end) {
      each([&](int64_t m) { activate<T>(wide + m * ldi, layer.c_fc.bias, begin, end); });
    });
    each([&](int64_t m) { memset(wide + m * ldi + F, 0, (padded(F) - F) * sizeof(float)); });
    any_product<T>(run, layer.c_proj, wide, ldi, M, z, ld, rounded, add_to_x(layer.c_proj));
  }
  for (int64_t b = 0; b < s.B; ++b)  // the kept rows to the front, where they came from further behind
    for (int64_t t = 0; t < s.keep; ++t)
      memmove(x + (b * s.keep + t) * ld, x + ((b + 1) * s.T - s.keep + t) * ld, C * sizeof(float));
  const int64_t kept = s.B * s.keep;
  if (s.norm) layer_norm<T>(*s.norm, x, y, C, ld, kept);
  const float* last = s.norm ? y : x;
  if (!s.head) {
    for (int64_t m = 0; m < kept; ++m) store(last + m * ld, static_cast<T*>(s.out) + m * C, C);
    return;
  }
  float* logits = static_cast<float*>(s.out);
  any_product<T>(run, *s.head, last, ld, kept, logits, s.V, rounded, [](int64_t, int64_t) {});
}

template <typename T>
void linear(const Linear& l, Parallel run, float* workspace) {
  const int64_t M = l.M, K = l.product.inputs, N = l.product.outputs, ld = padded(K), ldy = padded(N);
  float *x = workspace, *normed = x + M * ld, *y = normed + M * ld, *rounded = y + M * ldy;
  for (int64_t m = 0; m < M; ++m) {
    const T* from = static_cast<const T*>(l.x) + m * K;
    int64_t k = 0;
    for (; k + kLanes <= K; k += kLanes) write(x + m * ld + k, load<kLanes>(from + k));
    for (; k < K; ++k) x[m * ld + k] = widen(from[k]);
    for (; k < ld; ++k) x[m * ld + k] = normed[m * ld + k] = 0;
  }
  if (l.norm) layer_norm<T>(*l.norm, x, normed, K, ld, M);
  const T *bias = static_cast<const T*>(l.product.bias), *residual = static_cast<const T*>(l.residual);
  any_product<T>(run, l.product, l.norm ? normed : x, ld, M, y, ldy, rounded, [&](int64_t begin, int64_t end) {
    for (int64_t m = 0; m < M; ++m) {
      float* row = y + m * ldy;
      if (l.gelu) activate<T>(row, bias, begin, end);
      if (bias && !l.gelu) add_numbers(row, bias, begin, end);
      if (residual) add_numbers(row, residual + m * N, begin, end);
      store(row + begin, static_cast<T*>(l.out) + m * N + begin, end - begin);
    }
  });
}

template <typename T>
void gelu(T* x, int64_t count, Parallel run) {
  parallel(run, (count + kPad - 1) / kPad, kGrain / kPad / 8, [&](int64_t begin, int64_t end) {
    int64_t i = begin * kPad;
    const int64_t last = min(count, end * kPad);
    for (; i + kLanes <= last; i += kLanes) {
      float part[kLanes];
      write(part, gelu_new(load<kLanes>(x + i)));
      store(part, x + i, kLanes);
    }
    if (i < last) {
      float part[kLanes];
      write(part, gelu_new(load_end<kLanes>(x + i, last - i)));
      store(part, x + i, last - i);
    }
  });
}

// Calls of(T{}) with the type that a number is of.
template <typename Of>
void typed(Number number, const Of& of) {
  switch (number) {
    case Number::kFloat32: return of(float{});
    case Number::kBFloat16: return of(BFloat16{});
    case Number::kFloat16: return of(Float16{});
    default: return;  // no number that anything but weights has
  }
}

void decode_any(const Step& s, Parallel run, float* workspace) {
  typed(s.number, [&](auto type) { decode<decltype(type)>(s, run, workspace); });
}

void linear_any(const Linear& l, Parallel run, float* workspace) {
  typed(l.number, [&](auto type) { linear<decltype(type)>(l, run, workspace); });
}

void attention_any(const Attention& a, Parallel run, Workspace workspace) {
  typed(a.number, [&](auto type) { attention<decltype(type)>(a, run, workspace); });
}

void gelu_any(Number number, void* numbers, int64_t count, Parallel run) {
  typed(number, [&](auto type) { gelu(static_cast<decltype(type)*>(numbers), count, run); });
}

void dequantize_any(const Product& p, int64_t first, int64_t rows, Number number, void* out, Parallel run) {
  typed(number, [&](auto type) {
    parallel(run, rows, max(1, kGrain / p.inputs), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        auto* to = static_cast<decltype(type)*>(out) + n * p.inputs;
        p.number == Number::kInt8 ? dequantize_row<Int8>(p, first + n, to) : dequantize_row<Int4>(p, first + n, to);
      }
    });
  });
}

}  // namespace

#if defined(__AVX512VNNI__)
#define NAME lanes_16_vnni
#else
#define NAME JOIN(lanes_, GPTNEO_FAST_LANES)
#endif
const Lanes NAME = {decode_any, linear_any, attention_any, gelu_any, dequantize_any, statistics,
                    likeliest,  at_least,   exponentials,  twist,    hopeful};

}  // namespace gptneo_fast
