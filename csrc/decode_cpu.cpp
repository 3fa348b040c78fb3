// The ops of the CPU for a few rows, which take as long as reading the weights does: `linear`, and `decode`: embedding, a run of
// blocks and the head in one call. Its parameters were named once, by `plan`, because handing 13 tensors a block over costs more
// than a small model's step; they are read where they stand, and looked at anew, in each call: a plan holds tensors, not
// addresses.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "decode.h"

namespace gptneo_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kParameters = 13;  // of a block: ln_1 2, q, k, v, out_proj 2, ln_2 2, c_fc 2, c_proj 2
constexpr int64_t kMaxHeadDim = 512;

// An argument that does not fit, in parts that are put together only where it does not.
template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  text << "gptneo_fast_csrc: ";
  ((text << parts), ...);
  throw std::runtime_error(text.str());
}

std::string shape(const Tensor& t) {
  std::ostringstream text;
  text << torch::headeronly::toString(t.scalar_type()) << " [";
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  return text.str() + "]";
}

// What a step reads: the parameters of `windows.size()` blocks; before them wte and wpe or nothing; after them ln_f's weight and
// bias, and lm_head's weight, or nothing.
struct Plan {
  std::vector<Tensor> embeddings, blocks, last;
  std::vector<int64_t> windows;
  std::vector<double> eps;  // of ln_1 and ln_2 of each block, then of ln_f
};

// Reads parameters of one dtype; of a block, or of none (-1).
struct Reader {
  ScalarType dtype;
  int64_t block;

  // The data of [rows, columns], or with `rows` 0 of [columns].
  const void* operator()(const Tensor& t, int64_t rows, int64_t columns, const char* name) const {
    const bool fits = rows ? t.dim() == 2 && t.size(0) == rows && t.size(1) == columns : t.dim() == 1 && t.size(0) == columns;
    if (fits && t.scalar_type() == dtype && t.is_contiguous() && t.is_cpu()) return t.const_data_ptr();
    std::ostringstream where;
    if (block >= 0) where << "block " << block << "'s ";
    const std::string size = rows ? std::to_string(rows) + ", " + std::to_string(columns) : std::to_string(columns);
    refuse(where.str(), name, " is ", shape(t), ", but must be contiguous ", torch::headeronly::toString(dtype), " [", size,
           "] on the CPU");
  }

  int64_t rows_of(const Tensor& t, const char* name) const {
    if (t.dim() != 2 || t.size(0) < 1) refuse(name, " is ", shape(t), ", but must have two axes");
    return t.size(0);
  }
};

// What the layers of a cache have in common.
struct Cached {
  int64_t B, H, D;
};

void read_cache(Layer& l, const Tensor& keys, const Tensor& values, ScalarType dtype, const Cached& c) {
  const Tensor* both[] = {&keys, &values};
  for (const Tensor* t : both) {
    bool fits = t->dim() == 4 && t->scalar_type() == dtype && t->is_cpu() && t->size(0) == c.B && t->size(1) == c.H &&
                t->size(3) == c.D && t->size(2) == keys.size(2) && t->size(2) > 0 && (c.D == 1 || t->stride(3) == 1);
    for (int axis = 0; fits && axis < 3; ++axis)
      fits = t->size(axis) == 1 || (t->stride(axis) == keys.stride(axis) && t->stride(axis) != 0);
    if (!fits)
      refuse("keys or values are ", shape(*t), ", but must be ", torch::headeronly::toString(dtype), " [", c.B, ", ", c.H,
             ", slots, ", c.D, "] on the CPU, of the same strides, the last axis dense");
  }
  l.keys = static_cast<char*>(keys.mutable_data_ptr());
  l.values = static_cast<char*>(values.mutable_data_ptr());
  l.batch = keys.stride(0);
  l.head = keys.stride(1);
  l.token = keys.stride(2);
  l.R = keys.size(2);
}

void read_parameters(Layer& l, const Tensor* p, const Reader& read, int64_t C) {
  const int64_t F = read.rows_of(p[9], "c_fc.weight");
  l.ln_1.weight = read(p[0], 0, C, "ln_1.weight");
  l.ln_1.bias = read(p[1], 0, C, "ln_1.bias");
  l.qkv = {{read(p[2], C, C, "q_proj.weight"), read(p[3], C, C, "k_proj.weight"), read(p[4], C, C, "v_proj.weight")},
           3, C, C, nullptr};
  l.out_proj = {{read(p[5], C, C, "out_proj.weight")}, 1, C, C, read(p[6], 0, C, "out_proj.bias")};
  l.ln_2.weight = read(p[7], 0, C, "ln_2.weight");
  l.ln_2.bias = read(p[8], 0, C, "ln_2.bias");
  l.c_fc = {{read(p[9], F, C, "c_fc.weight")}, 1, F, C, read(p[10], 0, F, "c_fc.bias")};
  l.c_proj = {{read(p[11], C, F, "c_proj.weight")}, 1, C, F, read(p[12], 0, C, "c_proj.bias")};
}

const int64_t* numbers(const Tensor& t, int64_t B, int64_t T, bool one_row, int64_t limit, const char* name) {
  const bool rows = t.dim() == 2 && (t.size(0) == B || (one_row && t.size(0) == 1)) && t.size(1) == T;
  if (!(rows && t.scalar_type() == ScalarType::Long && t.is_contiguous() && t.is_cpu()))
    refuse(name, " is ", shape(t), ", but must be contiguous int64 [", B, ", ", T, "] on the CPU");
  const auto* p = static_cast<const int64_t*>(t.const_data_ptr());
  for (int64_t i = 0; i < t.numel(); ++i)
    if (p[i] < 0 || p[i] >= limit) refuse(name, " holds ", p[i], ", but must be from 0 to ", limit - 1);
  return p;
}

const int32_t* counts(const Tensor& t, int64_t B, const char* name) {
  if (!(t.dim() == 1 && t.size(0) == B && t.scalar_type() == ScalarType::Int && t.is_contiguous() && t.is_cpu()))
    refuse(name, " is ", shape(t), ", but must be contiguous int32 [", B, "] on the CPU");
  return static_cast<const int32_t*>(t.const_data_ptr());
}

// Every token that a query sees has a slot of its own.
void check_slots(const Step& s, const Layer& layer) {
  for (int64_t b = 0; b < s.B; ++b) {
    const int64_t held = s.lengths[b], start = s.starts ? s.starts[b] : 0, end = held + s.T - start;
    if (held < 0 || start < 0 || start > s.T) refuse("row ", b, " holds ", held, " tokens and begins at column ", start);
    const int64_t needed = layer.window ? std::min(end, layer.window - 1 + s.T) : end;
    if (needed > layer.R) refuse("a layer has ", layer.R, " slots, but row ", b, " needs ", needed);
  }
}

Number number_of(ScalarType dtype) {
  if (dtype == ScalarType::Float) return Number::kFloat32;
  if (dtype == ScalarType::BFloat16) return Number::kBFloat16;
  if (dtype == ScalarType::Half) return Number::kFloat16;
  refuse("weights are ", torch::headeronly::toString(dtype), ", but must be float32, bfloat16 or float16");
}

void run_parallel(int64_t count, int64_t grain, void (*task)(int64_t, int64_t, void*), void* context) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, grain, task, context));
}

// Lanes of the widest vectors that this CPU has and `most` allows; 0 for no limit.
int64_t lanes(int64_t most) {
  int64_t found = 4;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) found = 8;
  if (found == 8 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    found = 16;
#endif
  return most ? std::min(found, most) : found;
}

int64_t most_lanes() { return lanes(0); }

const Lanes& lanes_of(int64_t lanes) {
#if defined(__x86_64__)
  if (lanes == 16) return lanes_16;
  if (lanes == 8) return lanes_8;
#endif
  return lanes_4;
}

// An arena of a thread: a step that made its own would fault its pages in anew each time.
float* workspace(int64_t floats) {
  thread_local std::vector<float> arena;
  if (static_cast<int64_t>(arena.size()) < floats + kPad) arena.resize(floats + kPad);
  const auto address = reinterpret_cast<uintptr_t>(arena.data());
  return reinterpret_cast<float*>((address + 63) / 64 * 64);
}

std::mutex plans_lock;
std::unordered_map<int64_t, std::shared_ptr<const Plan>> plans;

int64_t make_plan(std::vector<Tensor> embeddings, std::vector<Tensor> blocks, std::vector<Tensor> last,
                  std::vector<int64_t> windows, std::vector<double> eps) {
  const size_t L = windows.size();
  if (L == 0 || blocks.size() != kParameters * L || eps.size() != 2 * L + !last.empty())
    refuse(blocks.size(), " parameters, ", L, " windows and ", eps.size(), " epsilons are not those of a number of blocks");
  if ((!embeddings.empty() && embeddings.size() != 2) || (!last.empty() && last.size() != 2 && last.size() != 3))
    refuse(embeddings.size(), " tensors before the blocks and ", last.size(), " after them");
  for (const int64_t window : windows)
    if (window < 0) refuse("a window is ", window, ", but must be 0 or more");
  auto plan = std::make_shared<const Plan>(
      Plan{std::move(embeddings), std::move(blocks), std::move(last), std::move(windows), std::move(eps)});
  static int64_t made = 0;
  const std::lock_guard<std::mutex> guard(plans_lock);
  plans.emplace(++made, std::move(plan));
  return made;
}

void forget_plan(int64_t number) {
  std::shared_ptr<const Plan> last;  // let go of its tensors after the lock
  const std::lock_guard<std::mutex> guard(plans_lock);
  const auto found = plans.find(number);
  if (found == plans.end()) return;
  last = std::move(found->second);
  plans.erase(found);
}

std::shared_ptr<const Plan> plan_of(int64_t number) {
  const std::lock_guard<std::mutex> guard(plans_lock);
  const auto found = plans.find(number);
  if (found == plans.end()) refuse("there is no plan ", number);
  return found->second;
}

Tensor decode(int64_t number, const Tensor& x, std::optional<Tensor> positions, std::optional<Tensor> types,
              std::vector<Tensor> keys, std::vector<Tensor> values, const Tensor& lengths, std::optional<Tensor> starts, int64_t keep,
              int64_t max_lanes) {
  const std::shared_ptr<const Plan> plan = plan_of(number);
  const int64_t L = static_cast<int64_t>(plan->windows.size());
  const bool embeds = !plan->embeddings.empty();
  if (x.dim() != (embeds ? 2 : 3) || !x.is_cpu() || !x.is_contiguous())
    refuse("x is ", shape(x), ", but must be contiguous ", embeds ? "ids [B, T]" : "hidden states [B, T, C]", " on the CPU");
  if (static_cast<int64_t>(keys.size()) != L || keys.size() != values.size())
    refuse(keys.size(), " keys and ", values.size(), " values, but ", L, " blocks");
  const int64_t B = x.size(0), T = x.size(1);
  const ScalarType dtype = plan->blocks[0].scalar_type();
  if (B * T < 1 || B * T > kMaxRows) refuse("x has ", B * T, " rows, but must have from 1 to ", kMaxRows);
  if (keep < 1 || keep > T) refuse("keep is ", keep, ", but must be from 1 to ", T);
  if (keys[0].dim() != 4) refuse("keys are ", shape(keys[0]), ", but must have four axes");
  const Cached cached{B, keys[0].size(1), keys[0].size(3)};
  if (cached.H < 1 || cached.D < 1 || cached.D > kMaxHeadDim)
    refuse("keys are ", shape(keys[0]), ", but a head must be from 1 to ", kMaxHeadDim, " wide");
  const Reader read{dtype, -1};
  Step s{};
  s.number = number_of(dtype);
  s.B = B, s.T = T, s.H = cached.H, s.D = cached.D, s.L = L, s.keep = keep;
  const int64_t C = s.C();
  if (embeds) {
    if (!positions) refuse("ids need positions");
    const Tensor &wte = plan->embeddings[0], &wpe = plan->embeddings[1];
    const int64_t V = read.rows_of(wte, "wte"), P = read.rows_of(wpe, "wpe");
    s.wte = read(wte, V, C, "wte.weight");
    s.wpe = read(wpe, P, C, "wpe.weight");
    s.ids = numbers(x, B, T, false, V, "ids");
    s.types = types ? numbers(*types, B, T, false, V, "token types") : nullptr;
    s.positions = numbers(*positions, B, T, true, P, "positions");
    s.position_rows = positions->size(0);
  } else {
    if (x.size(2) != C || x.scalar_type() != dtype) refuse("x is ", shape(x), ", but weights and cache are of width ", C);
    s.x = x.const_data_ptr();
  }
  s.lengths = counts(lengths, B, "lengths");
  s.starts = starts ? counts(*starts, B, "starts") : nullptr;
  std::vector<Layer> layers(L);
  for (int64_t i = 0; i < L; ++i) {
    Layer& layer = layers[i];
    read_parameters(layer, &plan->blocks[kParameters * i], Reader{dtype, i}, C);
    read_cache(layer, keys[i], values[i], dtype, cached);
    layer.window = plan->windows[i];
    layer.ln_1.eps = static_cast<float>(plan->eps[2 * i]);
    layer.ln_2.eps = static_cast<float>(plan->eps[2 * i + 1]);
    check_slots(s, layer);
  }
  s.layers = layers.data();
  Norm norm{};
  Product head{};
  if (!plan->last.empty()) {
    norm = {read(plan->last[0], 0, C, "ln_f.weight"), read(plan->last[1], 0, C, "ln_f.bias"),
            static_cast<float>(plan->eps.back())};
    s.norm = &norm;
  }
  if (plan->last.size() == 3) {
    s.V = read.rows_of(plan->last[2], "lm_head.weight");
    head = {{read(plan->last[2], s.V, C, "lm_head.weight")}, 1, s.V, C, nullptr};
    s.head = &head;
  }
  Tensor out = s.head ? torch::stable::new_empty(lengths, {B, keep, s.V}, ScalarType::Float)
                      : torch::stable::new_empty(keys[0], {B, keep, C});
  s.out = out.mutable_data_ptr();
  lanes_of(lanes(max_lanes)).decode(s, run_parallel, workspace(workspace_floats(s)));
  return out;
}

Tensor linear(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, std::optional<Tensor> residual,
              std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias, double eps, bool gelu, int64_t max_lanes) {
  const Reader read{weight.scalar_type(), -1};
  const int64_t N = read.rows_of(weight, "weight"), K = weight.size(1), rows = K ? x.numel() / K : 0;
  if (x.dim() < 1 || x.size(-1) != K || rows < 1 || rows > kMaxRows || x.scalar_type() != weight.scalar_type() ||
      !x.is_contiguous() || !x.is_cpu())
    refuse("x is ", shape(x), ", but must be contiguous, of the weight's dtype, 1 to ", kMaxRows, " rows of ", K, " numbers");
  Linear l{};
  l.number = number_of(weight.scalar_type());
  l.x = x.const_data_ptr();
  l.M = rows;
  l.product = {{read(weight, N, K, "weight")}, 1, N, K, bias ? read(*bias, 0, N, "bias") : nullptr};
  l.gelu = gelu;
  if (gelu && !bias) refuse("gelu needs a bias");
  Norm norm{};
  if (norm_weight || norm_bias) {
    if (!norm_weight || !norm_bias) refuse("a norm has a weight and a bias");
    norm = {read(*norm_weight, 0, K, "norm_weight"), read(*norm_bias, 0, K, "norm_bias"), static_cast<float>(eps)};
    l.norm = &norm;
  }
  if (residual) {
    if (residual->numel() != rows * N || residual->scalar_type() != weight.scalar_type() || !residual->is_contiguous() ||
        !residual->is_cpu())
      refuse("the residual is ", shape(*residual), ", but must be contiguous, of the weight's dtype, ", rows, " x ", N);
    l.residual = residual->const_data_ptr();
  }
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = N;
  Tensor out = torch::stable::new_empty(x, sizes);
  l.out = out.mutable_data_ptr();
  lanes_of(lanes(max_lanes)).linear(l, run_parallel, workspace(workspace_floats(l)));
  return out;
}

Tensor likeliest(const Tensor& logits, int64_t max_lanes) {
  if (!(logits.dim() == 2 && logits.size(1) > 0 && logits.scalar_type() == ScalarType::Float && logits.is_cpu() &&
        (logits.stride(1) == 1 || logits.size(1) == 1)))
    refuse("logits are ", shape(logits), ", but must be float32 [B, V] on the CPU, the last axis dense");
  Tensor best = torch::stable::new_empty(logits, {logits.size(0)}, ScalarType::Long);
  auto* p = static_cast<int64_t*>(best.mutable_data_ptr());
  const Lanes& of = lanes_of(lanes(max_lanes));
  for (int64_t b = 0; b < logits.size(0); ++b)
    p[b] = of.likeliest(static_cast<const float*>(logits.const_data_ptr()) + b * logits.stride(0), logits.size(1));
  return best;
}

STABLE_TORCH_LIBRARY_FRAGMENT(gptneo_fast_csrc, m) {
  m.def("plan(Tensor[] embeddings, Tensor[] blocks, Tensor[] last, int[] windows, float[] eps) -> int");
  m.def("forget_plan(int plan) -> ()");
  m.def(
      "decode(int plan, Tensor x, Tensor? positions, Tensor? types, Tensor(a!)[] keys, Tensor(b!)[] values, Tensor lengths,"
      " Tensor? starts, int keep, int max_lanes=0) -> Tensor");
  m.def(
      "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? norm_weight, Tensor? norm_bias, float eps,"
      " bool gelu, int max_lanes=0) -> Tensor");
  m.def("likeliest(Tensor logits, int max_lanes=0) -> Tensor");
  m.def("lanes() -> int");
}
STABLE_TORCH_LIBRARY_IMPL(gptneo_fast_csrc, CPU, m) {
  m.impl("decode", TORCH_BOX(&decode));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("likeliest", TORCH_BOX(&likeliest));
}
STABLE_TORCH_LIBRARY_IMPL(gptneo_fast_csrc, CompositeExplicitAutograd, m) {
  m.impl("plan", TORCH_BOX(&make_plan));
  m.impl("forget_plan", TORCH_BOX(&forget_plan));
  m.impl("lanes", TORCH_BOX(&most_lanes));
}

}  // namespace
}  // namespace gptneo_fast
