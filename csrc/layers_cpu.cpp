// The ops of the CPU that are parts of a layer: linear layers of a few rows, attention, gelu_new; and the likeliest token.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "running.h"

namespace gptneo_fast {
namespace {

Tensor linear(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, std::optional<Tensor> residual,
              std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias, double eps, bool gelu,
              std::optional<Tensor> scales, int64_t max_lanes) {
  const Reader read{x.scalar_type(), -1};
  Linear l{};
  l.number = number_of(x.scalar_type());
  const int64_t N = read.rows_of(weight, "weight"), K = scales && x.dim() > 0 ? x.size(-1) : weight.size(1);
  const int64_t rows = K ? x.numel() / K : 0, most = scales ? rows : kMaxRows;
  if (x.dim() < 1 || x.size(-1) != K || rows < 1 || rows > most || !x.is_contiguous() || !x.is_cpu())
    refuse("x is ", shape(x), ", but must be contiguous, 1 to ", kMaxRows, " rows of ", K, " numbers");
  const std::vector<Tensor> given = scales ? std::vector<Tensor>{*scales} : std::vector<Tensor>{};
  Scales of_weight{given, 0};
  read_weight(read, l.product, 0, weight, of_weight, N, K, "weight");
  if (bias) l.product.bias = read(*bias, 0, N, "bias");
  l.gelu = gelu;
  if (gelu && !bias) refuse("gelu needs a bias");
  Norm norm{};
  if (norm_weight || norm_bias) {
    if (!norm_weight || !norm_bias) refuse("a norm has a weight and a bias");
    norm = {read(*norm_weight, 0, K, "norm_weight"), read(*norm_bias, 0, K, "norm_bias"), static_cast<float>(eps)};
    l.norm = &norm;
  }
  if (residual && (residual->numel() != rows * N || residual->scalar_type() != x.scalar_type() || !residual->is_contiguous() ||
                   !residual->is_cpu()))
    refuse("the residual is ", shape(*residual), ", but must be contiguous, of the weight's dtype, ", rows, " x ", N);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = N;
  Tensor out = torch::stable::new_empty(x, sizes);
  const int64_t size = l.number == Number::kFloat32 ? 4 : 2;
  const auto* from = static_cast<const char*>(x.const_data_ptr());
  const auto* beside = residual ? static_cast<const char*>(residual->const_data_ptr()) : nullptr;
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  for (int64_t first = 0; first < rows; first += kManyRows) {
    l.M = std::min(kManyRows, rows - first);
    l.x = from + first * K * size, l.out = to + first * N * size;
    l.residual = beside ? beside + first * N * size : nullptr;
    lanes_of(max_lanes).linear(l, run_parallel, workspace(workspace_floats(l)));
  }
  return out;
}

// Rows of a weight in few bits, from row `first` on, into out [rows, K].
void dequantize(const Tensor& values, const Tensor& scales, int64_t first, const Tensor& out, int64_t max_lanes) {
  const Number number = number_of(out.scalar_type());
  if (out.dim() != 2 || out.size(1) < 1 || !out.is_contiguous() || !out.is_cpu())
    refuse("out is ", shape(out), ", but must be contiguous and have two axes on the CPU");
  const std::vector<Tensor> given = {scales};
  Scales of_weight{given, 0};
  const Reader read{out.scalar_type(), -1};
  Product p{};
  read_weight(read, p, 0, values, of_weight, read.rows_of(values, "weight"), out.size(1), "weight");
  if (!p.scales[0]) refuse("weight is ", shape(values), ", which is not in few bits");
  if (first < 0 || first > p.outputs - out.size(0)) refuse("rows ", first, " to ", first + out.size(0), " are not among ", p.outputs);
  lanes_of(max_lanes).dequantize(p, first, out.size(0), number, out.mutable_data_ptr(), run_parallel);
}

Tensor likeliest(const Tensor& logits, int64_t max_lanes) {
  if (!(logits.dim() == 2 && logits.size(1) > 0 && logits.scalar_type() == ScalarType::Float && logits.is_cpu() &&
        (logits.stride(1) == 1 || logits.size(1) == 1)))
    refuse("logits are ", shape(logits), ", but must be float32 [B, V] on the CPU, the last axis dense");
  Tensor best = torch::stable::new_empty(logits, {logits.size(0)}, ScalarType::Long);
  auto* p = static_cast<int64_t*>(best.mutable_data_ptr());
  const Lanes& of = lanes_of(max_lanes);
  for (int64_t b = 0; b < logits.size(0); ++b)
    p[b] = of.likeliest(static_cast<const float*>(logits.const_data_ptr()) + b * logits.stride(0), logits.size(1));
  return best;
}

// [B, H, tokens, D] of the attention's dtype.
Heads heads_of(const Attention& a, const Tensor& t, ScalarType dtype, int64_t tokens, const char* name) {
  const bool fits = t.dim() == 4 && t.scalar_type() == dtype && t.is_cpu() && t.size(0) == a.B && t.size(1) == a.H &&
                    t.size(2) == tokens && t.size(3) == a.D && (a.D == 1 || t.stride(3) == 1);
  if (!fits)
    refuse(name, " is ", shape(t), ", but must be ", torch::headeronly::toString(dtype), " [", a.B, ", ", a.H, ", ", tokens, ", ",
           a.D, "] on the CPU, the last axis dense");
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

Attention attention_of(const Tensor& q, int64_t window, const std::optional<Tensor>& starts,
                       const std::optional<Tensor>& ends, const std::optional<Tensor>& k_cache,
                       const std::optional<Tensor>& v_cache, const std::optional<Tensor>& lengths) {
  if (q.dim() != 4) refuse("q is ", shape(q), ", but must have four axes");
  const ScalarType dtype = q.scalar_type();
  Attention a{};
  a.number = number_of(dtype);
  a.B = q.size(0), a.H = q.size(1), a.T = q.size(2), a.D = q.size(3), a.window = window;
  if (window < 0) refuse("window is ", window, ", but must be 0 or more");
  a.q = heads_of(a, q, dtype, a.T, "q");
  if (k_cache.has_value() != v_cache.has_value() || k_cache.has_value() != lengths.has_value())
    refuse("k_cache, v_cache and lengths go together");
  if (k_cache) {
    a.R = k_cache->dim() == 4 ? k_cache->size(2) : 0;
    a.keys = heads_of(a, *k_cache, dtype, a.R, "k_cache");
    a.values = heads_of(a, *v_cache, dtype, a.R, "v_cache");
    a.lengths = counts(*lengths, a.B, "lengths");
  }
  a.starts = starts ? counts(*starts, a.B, "starts") : nullptr;
  a.ends = ends ? counts(*ends, a.B, "ends") : nullptr;
  for (int64_t b = 0; b < a.B; ++b) {
    if (a.lengths && a.lengths[b] < 0) refuse("row ", b, " holds ", a.lengths[b], " tokens");
    if (a.starts && (a.starts[b] < 0 || a.starts[b] > a.T)) refuse("row ", b, " begins at column ", a.starts[b]);
  }
  return a;
}

Tensor attend(Attention& a, const Tensor& q, int64_t max_lanes) {
  Tensor out = torch::stable::new_empty(q, {a.B, a.T, a.H * a.D});
  a.out = out.mutable_data_ptr();
  lanes_of(max_lanes).attention(a, run_parallel, workspace);
  return out;
}

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, int64_t window, std::optional<Tensor> starts,
                 std::optional<Tensor> ends, std::optional<Tensor> k_cache, std::optional<Tensor> v_cache,
                 std::optional<Tensor> lengths, int64_t max_lanes) {
  Attention a = attention_of(q, window, starts, ends, k_cache, v_cache, lengths);
  a.k = heads_of(a, k, q.scalar_type(), a.T, "k");
  a.v = heads_of(a, v, q.scalar_type(), a.T, "v");
  return attend(a, q, max_lanes);
}

Tensor decode_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& lengths, int64_t window,
                        std::optional<Tensor> starts, int64_t max_lanes) {
  Attention a = attention_of(q, window, starts, std::nullopt, k_cache, v_cache, lengths);
  return attend(a, q, max_lanes);
}

void gelu(const Tensor& x, int64_t max_lanes) {
  if (!x.is_contiguous() || !x.is_cpu()) refuse("x is ", shape(x), ", but must be contiguous on the CPU");
  lanes_of(max_lanes).gelu(number_of(x.scalar_type()), x.mutable_data_ptr(), x.numel(), run_parallel);
}

int64_t most_lanes() { return lanes(0); }

// Of rows of logits that lie in pieces [N, n], which together are [N, V].
std::tuple<Tensor, Tensor, Tensor, Tensor> statistics(std::vector<Tensor> logits, const Tensor& targets, int64_t max_lanes) {
  const int64_t N = targets.dim() == 1 ? targets.size(0) : -1;
  int64_t V = 0;
  for (const Tensor& piece : logits) {
    if (!(piece.dim() == 2 && piece.size(0) == N && piece.size(1) > 0 && piece.scalar_type() == ScalarType::Float &&
          piece.is_cpu() && (piece.stride(1) == 1 || piece.size(1) == 1)))
      refuse("logits are ", shape(piece), " and targets ", shape(targets), ", but must be float32 [N, n] on the CPU, the last "
             "axis dense, and int64 [N]");
    V += piece.size(1);
  }
  if (V == 0) refuse("there are no logits");
  Tensor rank = torch::stable::new_empty(targets, {N}, ScalarType::Long);
  Tensor own = torch::stable::new_empty(logits[0], {N}), entropy = torch::stable::new_empty(logits[0], {N});
  Tensor variance = torch::stable::new_empty(logits[0], {N});
  struct Context {
    const Lanes& of;
    const std::vector<Tensor>& logits;
    const int64_t* targets;
    int64_t* rank;
    float *own, *entropy, *variance;
  } context = {lanes_of(max_lanes), logits,
               numbers(torch::stable::unsqueeze(targets, 0), 1, N, false, V, "targets"),
               static_cast<int64_t*>(rank.mutable_data_ptr()), static_cast<float*>(own.mutable_data_ptr()),
               static_cast<float*>(entropy.mutable_data_ptr()), static_cast<float*>(variance.mutable_data_ptr())};
  const auto task = [](int64_t begin, int64_t end, void* given) {
    const auto& c = *static_cast<const Context*>(given);
    std::vector<Piece> row(c.logits.size());
    for (int64_t n = begin; n < end; ++n) {
      for (size_t i = 0; i < row.size(); ++i)
        row[i] = {static_cast<const float*>(c.logits[i].const_data_ptr()) + n * c.logits[i].stride(0), c.logits[i].size(1)};
      c.of.statistics(row.data(), static_cast<int64_t>(row.size()), c.targets[n], c.own + n, c.rank + n, c.entropy + n,
                      c.variance + n);
    }
  };
  if (N > 0) run_parallel(N, 1, task, &context);
  return {own, rank, entropy, variance};
}

STABLE_TORCH_LIBRARY_FRAGMENT(gptneo_fast_csrc, m) {
  m.def(
      "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? norm_weight, Tensor? norm_bias, float eps,"
      " bool gelu, Tensor? scales=None, int max_lanes=0) -> Tensor");
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, int window, Tensor? starts, Tensor? ends, Tensor? k_cache, Tensor? v_cache,"
      " Tensor? lengths, int max_lanes=0) -> Tensor");
  m.def(
      "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, int window, Tensor? starts,"
      " int max_lanes=0) -> Tensor");
  m.def("dequantize(Tensor values, Tensor scales, int first, Tensor(a!) out, int max_lanes=0) -> ()");
  m.def("gelu(Tensor(a!) x, int max_lanes=0) -> ()");
  m.def("statistics(Tensor[] logits, Tensor targets, int max_lanes=0) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("likeliest(Tensor logits, int max_lanes=0) -> Tensor");
  m.def("lanes() -> int");
}
STABLE_TORCH_LIBRARY_IMPL(gptneo_fast_csrc, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("decode_attention", TORCH_BOX(&decode_attention));
  m.impl("dequantize", TORCH_BOX(&dequantize));
  m.impl("gelu", TORCH_BOX(&gelu));
  m.impl("statistics", TORCH_BOX(&statistics));
  m.impl("likeliest", TORCH_BOX(&likeliest));
}
STABLE_TORCH_LIBRARY_IMPL(gptneo_fast_csrc, CompositeExplicitAutograd, m) { m.impl("lanes", TORCH_BOX(&most_lanes)); }

}  // namespace
}  // namespace gptneo_fast
