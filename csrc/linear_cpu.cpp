// The op gptneo_fast_csrc::linear: linear layers of a few rows on the CPU. They are bound by memory: each weight is read once.
// One op serves all of a decode step: [LayerNorm of x] -> weight -> [bias] -> [gelu_new] -> [residual]. Sums are float32.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace gptneo_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxRows = 4;  // of x; with more, a blocked GEMM reads weights seldom enough
constexpr int64_t kBlock = 16;   // output columns that a thread takes at a time
constexpr int64_t kLanes = 16;
constexpr int64_t kGrain = 1 << 17;  // bytes of weights that are worth a thread

typedef float Floats __attribute__((vector_size(64), aligned(4)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32), aligned(2)));

struct BFloat16 {
  uint16_t bits;
};

inline float widen(float x) { return x; }
inline float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline void narrow(float x, float* out) { *out = x; }
inline void narrow(float x, BFloat16* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const bool nan = x != x;
  out->bits = nan ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // to nearest, ties to even
}

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

INLINE Floats load(const float* p) { return *reinterpret_cast<const Floats*>(p); }
INLINE Floats load(const BFloat16* p) {
  const Words words = __builtin_convertvector(*reinterpret_cast<const Halves*>(p), Words) << 16;
  return reinterpret_cast<const Floats&>(words);
}

// The last `count` numbers of a row, fewer than the lanes, and `pad` in the others.
template <typename T>
INLINE Floats load_end(const T* p, int64_t count, T pad = {}) {
  T part[kLanes];
  std::fill_n(part, kLanes, pad);
  std::memcpy(part, p, count * sizeof(T));
  return load(part);
}

// Pairwise, which errs less than one after the other.
INLINE float sum(Floats v) {
  float part[kLanes];
  std::memcpy(part, &v, sizeof(part));
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; i++) part[i] += part[i + half];
  return part[0];
}

// out[r * stride] = dot(w, x + r * K) for R rows of x. Several chains of additions hide the latency of each. The
// end of a row goes into the lanes as well: added to their sum product by product it would err more.
template <int R, typename T>
INLINE void dot(const T* w, const float* x, int64_t K, float* out, int64_t stride) {
  constexpr int kChains = R >= 4 ? 1 : 4 / R;
  Floats acc[R][kChains] = {};
  int64_t k = 0;
  for (; k + kLanes * kChains <= K; k += kLanes * kChains)
    UNROLL for (int c = 0; c < kChains; c++) {
      const Floats weight = load(w + k + c * kLanes);
      UNROLL for (int r = 0; r < R; r++) acc[r][c] += weight * load(x + r * K + k + c * kLanes);
    }
  for (; k + kLanes <= K; k += kLanes) {
    const Floats weight = load(w + k);
    UNROLL for (int r = 0; r < R; r++) acc[r][0] += weight * load(x + r * K + k);
  }
  if (k < K) {
    const Floats weight = load_end(w + k, K - k);
    UNROLL for (int r = 0; r < R; r++) acc[r][0] += weight * load_end(x + r * K + k, K - k);
  }
  for (int r = 0; r < R; r++) {
    Floats total = acc[r][0];
    for (int c = 1; c < kChains; c++) total += acc[r][c];
    out[r * stride] = sum(total);
  }
}

// Output columns [begin, end) of R rows: y[r * (end - begin) + column - begin].
template <int R, typename T>
INLINE void columns(const T* w, const float* x, int64_t K, int64_t begin, int64_t end, float* y) {
  for (int64_t n = begin; n < end; n++) dot<R>(w + n * K, x, K, y + n - begin, end - begin);
}

template <typename T>
INLINE void columns(const T* w, const float* x, int64_t rows, int64_t K, int64_t begin, int64_t end, float* y) {
  switch (rows) {
    case 1: return columns<1>(w, x, K, begin, end, y);
    case 2: return columns<2>(w, x, K, begin, end, y);
    case 3: return columns<3>(w, x, K, begin, end, y);
    default: return columns<4>(w, x, K, begin, end, y);
  }
}

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__) && __GNUC__ >= 12
#define EVERY_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EVERY_CPU
#endif

EVERY_CPU void columns_of(const float* w, const float* x, int64_t rows, int64_t K, int64_t begin, int64_t end, float* y) {
  columns(w, x, rows, K, begin, end, y);
}
EVERY_CPU void columns_of(const BFloat16* w, const float* x, int64_t rows, int64_t K, int64_t begin, int64_t end, float* y) {
  columns(w, x, rows, K, begin, end, y);
}

template <typename T>
const T* data(const std::optional<Tensor>& t) {
  return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

// Sum of (x - shift) ^ power over a row, power 1 or 2.
template <int power>
INLINE float moment(const float* x, int64_t K, float shift) {
  Floats total = {};
  for (int64_t k = 0; k < K; k += kLanes) {
    const Floats d = (k + kLanes <= K ? load(x + k) : load_end(x + k, K - k, shift)) - shift;
    total += power == 1 ? d : d * d;
  }
  return sum(total);
}

template <typename T>
void layer_norm(float* x, int64_t rows, int64_t K, const T* weight, const T* bias, double eps) {
  for (int64_t r = 0; r < rows; r++, x += K) {
    const float mean = moment<1>(x, K, 0) / K;
    const float scale = 1 / std::sqrt(moment<2>(x, K, mean) / K + static_cast<float>(eps));
    for (int64_t k = 0; k < K; k++) x[k] = (x[k] - mean) * scale * widen(weight[k]) + widen(bias[k]);
  }
}

inline float gelu_new(float x) { return 0.5f * x * (1 + std::tanh(0.7978845608028654f * (x + 0.044715f * x * x * x))); }

template <typename T>
void linear(const T* x, const T* w, const T* bias, const T* residual, const T* norm_weight, const T* norm_bias,
            double eps, bool gelu, T* out, int64_t rows, int64_t K, int64_t N) {
  std::vector<float> wide(rows * K);
  for (int64_t i = 0; i < rows * K; i++) wide[i] = widen(x[i]);
  if (norm_weight) layer_norm(wide.data(), rows, K, norm_weight, norm_bias, eps);
  const int64_t blocks = (N + kBlock - 1) / kBlock;
  const int64_t grain = std::max<int64_t>(1, kGrain / (kBlock * K * static_cast<int64_t>(sizeof(T))));
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t first, int64_t last) {
    float y[kMaxRows * kBlock];
    for (int64_t b = first; b < last; b++) {
      const int64_t begin = b * kBlock, end = std::min(N, begin + kBlock), width = end - begin;
      columns_of(w, wide.data(), rows, K, begin, end, y);
      for (int64_t r = 0; r < rows; r++)
        for (int64_t n = 0; n < width; n++) {
          float value = y[r * width + n] + (bias ? widen(bias[begin + n]) : 0.0f);
          if (gelu) value = gelu_new(value);
          if (residual) value += widen(residual[r * N + begin + n]);
          narrow(value, out + r * N + begin + n);
        }
    }
  });
}

void check(bool holds, const char* what) {
  if (!holds) throw std::runtime_error(std::string("linear: ") + what);
}

Tensor linear_cpu(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, std::optional<Tensor> residual,
                  std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias, double eps, bool gelu) {
  check(weight.dim() == 2 && x.dim() >= 1 && x.size(-1) == weight.size(1), "x must be [..., K] and weight [N, K]");
  const int64_t N = weight.size(0), K = weight.size(1), rows = K ? x.numel() / K : 0;
  check(rows >= 1 && rows <= kMaxRows, "x must have 1 to 4 rows");
  const ScalarType dtype = x.scalar_type();
  check(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "x must be float32 or bfloat16");
  const auto fits = [&](const std::optional<Tensor>& t, int64_t numel) {
    return !t || (t->numel() == numel && t->scalar_type() == dtype && t->is_contiguous() && t->is_cpu());
  };
  check(fits(x, rows * K) && fits(weight, N * K) && fits(bias, N) && fits(residual, rows * N) && fits(norm_weight, K) &&
            fits(norm_bias, K) && norm_weight.has_value() == norm_bias.has_value(),
        "all tensors must be contiguous, on the CPU, of the dtype of x and of fitting sizes");
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = N;
  Tensor out = torch::stable::new_empty(x, shape);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    linear(data<T>(x), data<T>(weight), data<T>(bias), data<T>(residual), data<T>(norm_weight), data<T>(norm_bias), eps, gelu,
           static_cast<T*>(out.mutable_data_ptr()), rows, K, N);
  };
  if (dtype == ScalarType::BFloat16) {
    run(BFloat16{});
  } else {
    run(0.0f);
  }
  return out;
}

STABLE_TORCH_LIBRARY_FRAGMENT(gptneo_fast_csrc, m) {
  m.def(
      "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? norm_weight, Tensor? norm_bias, float eps,"
      " bool gelu) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(gptneo_fast_csrc, CPU, m) { m.impl("linear", TORCH_BOX(&linear_cpu)); }

}  // namespace
}  // namespace gptneo_fast
