// The op `decode`: embedding, a run of blocks and the head for a few rows in one call. Its parameters were named once, by
// `plan`, because handing 13 tensors a block over costs more than a small model's step; they are read where they stand, and
// looked at anew, in each call: a plan holds tensors, not addresses.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <vector>

#include "draw.h"
#include "running.h"

namespace gptneo_fast {
namespace {

constexpr int64_t kParameters = 13;  // of a block: ln_1 2, q, k, v, out_proj 2, ln_2 2, c_fc 2, c_proj 2

// What a step reads: the parameters of `windows.size()` blocks; before them wte and wpe or nothing; after them ln_f's weight
// and bias, and lm_head's weight, or nothing. Of weights in few bits the scales, in that order.
struct Plan {
  std::vector<Tensor> embeddings, blocks, last, scales;
  std::vector<int64_t> windows;
  std::vector<double> eps;  // of ln_1 and ln_2 of each block, then of ln_f
};

void read_cache(Layer& l, const Tensor& keys, const Tensor& values, ScalarType dtype, const Step& c) {
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

void read_parameters(Layer& l, const Tensor* p, const Reader& read, Scales& scales, int64_t C) {
  const int64_t F = read.rows_of(p[9], "c_fc.weight");
  l.ln_1.weight = read(p[0], 0, C, "ln_1.weight");
  l.ln_1.bias = read(p[1], 0, C, "ln_1.bias");
  read_weight(read, l.qkv, 0, p[2], scales, C, C, "q_proj.weight");
  read_weight(read, l.qkv, 1, p[3], scales, C, C, "k_proj.weight");
  read_weight(read, l.qkv, 2, p[4], scales, C, C, "v_proj.weight");
  read_weight(read, l.out_proj, 0, p[5], scales, C, C, "out_proj.weight");
  l.out_proj.bias = read(p[6], 0, C, "out_proj.bias");
  l.ln_2.weight = read(p[7], 0, C, "ln_2.weight");
  l.ln_2.bias = read(p[8], 0, C, "ln_2.bias");
  read_weight(read, l.c_fc, 0, p[9], scales, F, C, "c_fc.weight");
  l.c_fc.bias = read(p[10], 0, F, "c_fc.bias");
  read_weight(read, l.c_proj, 0, p[11], scales, C, F, "c_proj.weight");
  l.c_proj.bias = read(p[12], 0, C, "c_proj.bias");
}

// Every token that a query sees has a slot of its own, `ahead` tokens later, too.
void check_slots(const Step& s, const Layer& layer, int64_t ahead) {
  for (int64_t b = 0; b < s.B; ++b) {
    const int64_t held = s.lengths[b], start = s.starts ? s.starts[b] : 0, end = held + s.T - start;
    if (held < 0 || start < 0 || start > s.T) refuse("row ", b, " holds ", held, " tokens and begins at column ", start);
    const int64_t needed = layer.window ? std::min(end + ahead, layer.window - 1 + s.T) : end + ahead;
    if (needed > layer.R) refuse("a layer has ", layer.R, " slots, but row ", b, " needs ", needed);
  }
}

std::mutex plans_lock;
std::unordered_map<int64_t, std::shared_ptr<const Plan>> plans;
#if defined(__unix__) || defined(__APPLE__)  // a child whose parent had another thread in here would wait for ever
const int at_fork = pthread_atfork([] { plans_lock.lock(); }, [] { plans_lock.unlock(); }, [] { plans_lock.unlock(); });
#endif

int64_t make_plan(std::vector<Tensor> embeddings, std::vector<Tensor> blocks, std::vector<Tensor> last,
                  std::vector<Tensor> scales, std::vector<int64_t> windows, std::vector<double> eps) {
  const size_t L = windows.size();
  if (L == 0 || blocks.size() != kParameters * L || eps.size() != 2 * L + !last.empty())
    refuse(blocks.size(), " parameters, ", L, " windows and ", eps.size(), " epsilons are not those of a number of blocks");
  if ((!embeddings.empty() && embeddings.size() != 2) || (!last.empty() && last.size() != 2 && last.size() != 3))
    refuse(embeddings.size(), " tensors before the blocks and ", last.size(), " after them");
  for (const int64_t window : windows)
    if (window < 0) refuse("a window is ", window, ", but must be 0 or more");
  auto plan = std::make_shared<const Plan>(
      Plan{std::move(embeddings), std::move(blocks), std::move(last), std::move(scales), std::move(windows), std::move(eps)});
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

// A step, and what it points to.
struct Prepared {
  std::shared_ptr<const Plan> plan;
  Step s{};
  std::vector<Layer> layers;
  Norm norm{};
  Product head{};
  std::vector<Tensor> keys, values;
};

void read_inputs(Prepared& p, const Tensor& x, const std::optional<Tensor>& positions, const std::optional<Tensor>& types,
                 Scales& scales) {
  Step& s = p.s;
  const ScalarType dtype = p.plan->blocks[0].scalar_type();
  const Reader read{dtype, -1};
  const int64_t B = s.B, T = s.T, C = s.C();
  if (p.plan->embeddings.empty()) {
    if (x.size(2) != C || x.scalar_type() != dtype) refuse("x is ", shape(x), ", but weights and cache are of width ", C);
    s.x = x.const_data_ptr();
    return;
  }
  if (!positions) refuse("ids need positions");
  const Tensor &wte = p.plan->embeddings[0], &wpe = p.plan->embeddings[1];
  const int64_t V = read.rows_of(wte, "wte"), P = read.rows_of(wpe, "wpe");
  read_weight(read, s.wte, 0, wte, scales, V, C, "wte.weight");
  s.wpe = read(wpe, P, C, "wpe.weight");
  s.ids = numbers(x, B, T, false, V, "ids");
  s.types = types ? numbers(*types, B, T, false, V, "token types") : nullptr;
  s.positions = numbers(*positions, B, T, true, P, "positions");
  s.position_rows = positions->size(0);
}

void read_last(Prepared& p, Scales& scales) {
  const std::vector<Tensor>& last = p.plan->last;
  const Reader read{p.plan->blocks[0].scalar_type(), -1};
  const int64_t C = p.s.C();
  if (last.empty()) return;
  p.norm = {read(last[0], 0, C, "ln_f.weight"), read(last[1], 0, C, "ln_f.bias"), static_cast<float>(p.plan->eps.back())};
  p.s.norm = &p.norm;
  if (last.size() < 3) return;
  p.s.V = read.rows_of(last[2], "lm_head.weight");
  read_weight(read, p.head, 0, last[2], scales, p.s.V, C, "lm_head.weight");
  p.s.head = &p.head;
}

// Everything but `keep` and the output; the cache must have room for `ahead` tokens more.
void prepare(Prepared& p, int64_t number, const Tensor& x, const std::optional<Tensor>& positions,
             const std::optional<Tensor>& types, const Tensor& lengths, const std::optional<Tensor>& starts, int64_t ahead) {
  p.plan = plan_of(number);
  Step& s = p.s;
  s.L = static_cast<int64_t>(p.plan->windows.size());
  const bool embeds = !p.plan->embeddings.empty();
  if (x.dim() != (embeds ? 2 : 3) || !x.is_cpu() || !x.is_contiguous())
    refuse("x is ", shape(x), ", but must be contiguous ", embeds ? "ids [B, T]" : "hidden states [B, T, C]", " on the CPU");
  if (static_cast<int64_t>(p.keys.size()) != s.L || p.keys.size() != p.values.size())
    refuse(p.keys.size(), " keys and ", p.values.size(), " values, but ", s.L, " blocks");
  s.B = x.size(0), s.T = x.size(1);
  const ScalarType dtype = p.plan->blocks[0].scalar_type();
  s.number = number_of(dtype);
  if (s.B * s.T < 1 || s.B * s.T > kMaxRows) refuse("x has ", s.B * s.T, " rows, but must have from 1 to ", kMaxRows);
  if (p.keys[0].dim() != 4) refuse("keys are ", shape(p.keys[0]), ", but must have four axes");
  s.H = p.keys[0].size(1), s.D = p.keys[0].size(3);
  if (s.H < 1 || s.D < 1 || s.D > kMaxHeadDim)
    refuse("keys are ", shape(p.keys[0]), ", but a head must be from 1 to ", kMaxHeadDim, " wide");
  Scales scales{p.plan->scales, 0};
  read_inputs(p, x, positions, types, scales);
  s.lengths = counts(lengths, s.B, "lengths");
  s.starts = starts ? counts(*starts, s.B, "starts") : nullptr;
  p.layers.resize(s.L);
  for (int64_t i = 0; i < s.L; ++i) {
    Layer& layer = p.layers[i];
    read_parameters(layer, &p.plan->blocks[kParameters * i], Reader{dtype, i}, scales, s.C());
    read_cache(layer, p.keys[i], p.values[i], dtype, s);
    layer.window = p.plan->windows[i];
    layer.ln_1.eps = static_cast<float>(p.plan->eps[2 * i]);
    layer.ln_2.eps = static_cast<float>(p.plan->eps[2 * i + 1]);
    check_slots(s, layer, ahead);
  }
  s.layers = p.layers.data();
  read_last(p, scales);
}

Tensor decode(int64_t number, const Tensor& x, std::optional<Tensor> positions, std::optional<Tensor> types,
              std::vector<Tensor> keys, std::vector<Tensor> values, const Tensor& lengths, std::optional<Tensor> starts,
              int64_t keep, int64_t max_lanes) {
  Prepared p;
  p.keys = std::move(keys), p.values = std::move(values);
  prepare(p, number, x, positions, types, lengths, starts, 0);
  Step& s = p.s;
  if (keep < 1 || keep > s.T) refuse("keep is ", keep, ", but must be from 1 to ", s.T);
  s.keep = keep;
  Tensor out = s.head ? torch::stable::new_empty(lengths, {s.B, keep, s.V}, ScalarType::Float)
                      : torch::stable::new_empty(p.keys[0], {s.B, keep, s.C()});
  s.out = out.mutable_data_ptr();
  lanes_of(max_lanes).decode(s, run_parallel, workspace(workspace_floats(s)));
  return out;
}

// The tokens [B] of one step from logits [B, V], into `tokens`: the likeliest, or drawn where there are `numbers`; -1 where a
// row's are not finite. Logits may change. Nothing is drawn where no row goes on. False where a draw is for torch.
bool next_tokens(const Lanes& of, std::vector<float>& logits, int64_t V, const std::vector<bool>& runs, bool may_end,
                 const std::vector<int64_t>& ends, const Draws& how, Twister* numbers, std::vector<int64_t>& tokens) {
  bool goes_on = false;
  for (size_t b = 0; b < runs.size(); ++b) {
    tokens[b] = of.likeliest(&logits[b * V], V);
    goes_on = goes_on || (runs[b] && tokens[b] >= 0);
  }
  if (numbers && !goes_on) return true;
  for (size_t b = 0; b < runs.size(); ++b) {
    float* row = &logits[b * V];
    if (tokens[b] < 0) {
      if (!numbers) continue;
      std::fill(row, row + V, 0.0f);  // something is drawn of every row, so that the others draw what they would
    }
    if (!may_end)
      for (const int64_t end : ends) row[end] = -std::numeric_limits<float>::infinity();
    int64_t token = tokens[b];
    if (numbers) {
      token = draw(of, how, row, V, *numbers);
      if (token < 0) return false;
    } else if (!may_end && std::binary_search(ends.begin(), ends.end(), token)) {
      token = std::max_element(row, row + V) - row;
    }
    if (tokens[b] >= 0) tokens[b] = token;
  }
  return true;
}

// Up to `steps` steps, each on the tokens that the one before it gave: int64 [B, n], fewer where all rows have ended, or where
// the next draw is for torch. The first token of a row that is one of `ends` is its last; `pad` follows. A row whose logits are
// not finite gets -1 in that place, and has ended. In the first `least` steps `ends` are not chosen. state: of the generator
// that tokens are drawn with; without it they are the likeliest.
Tensor several(int64_t number, const Tensor& ids, const Tensor& positions, std::vector<Tensor> keys,
               std::vector<Tensor> values, const Tensor& lengths, const Tensor& running, std::vector<int64_t> ends, int64_t pad,
               int64_t least, int64_t steps, std::optional<Tensor> state, double temperature, int64_t top_k, double top_p,
               int64_t max_lanes) {
  if (steps < 1) refuse("steps is ", steps, ", but must be at least 1");
  Prepared p;
  p.keys = std::move(keys), p.values = std::move(values);
  prepare(p, number, ids, positions, std::nullopt, lengths, std::nullopt, steps - 1);
  Step& s = p.s;
  if (!s.head || !s.ids || s.T != 1) refuse("several steps are from ids [B, 1] to logits");
  if (pad < 0 || pad >= s.V) refuse("pad is ", pad, ", but must be from 0 to ", s.V - 1);
  if (running.dim() != 1 || running.size(0) != s.B || running.scalar_type() != ScalarType::Bool || !running.is_contiguous() ||
      !running.is_cpu())
    refuse("running is ", shape(running), ", but must be contiguous Bool [", s.B, "] on the CPU");
  const int64_t P = p.plan->embeddings[1].size(0), V = p.plan->embeddings[0].size(0);
  if (s.V > V) refuse("the head has ", s.V, " tokens, but only ", V, " have an embedding");
  std::sort(ends.begin(), ends.end());
  ends.erase(std::unique(ends.begin(), ends.end()), ends.end());
  ends.erase(std::remove_if(ends.begin(), ends.end(), [&](int64_t end) { return end < 0 || end >= s.V; }), ends.end());
  if (least > 0 && static_cast<int64_t>(ends.size()) == s.V) refuse("every token is an end");
  for (int64_t i = 0; i < s.position_rows; ++i)
    if (s.positions[i] + steps > P) refuse("positions go on from ", s.positions[i], " for ", steps, ", past ", P);
  const Draws how(temperature, top_k, top_p);
  const Lanes& of = lanes_of(max_lanes);
  std::optional<Twister> numbers, before;
  if (state) numbers.emplace(of, *state);
  const auto* alive = static_cast<const bool*>(running.const_data_ptr());
  std::vector<bool> runs(alive, alive + s.B);
  std::vector<int64_t> token(s.ids, s.ids + s.B), place(s.positions, s.positions + s.position_rows), next(s.B), found;
  std::vector<int32_t> held(s.lengths, s.lengths + s.B);
  std::vector<float> logits(s.B * s.V);
  s.ids = token.data(), s.positions = place.data(), s.lengths = held.data(), s.keep = 1, s.out = logits.data();
  float* space = workspace(workspace_floats(s));
  int64_t n = 0;
  for (bool any = true; any && n < steps; ++n) {
    of.decode(s, run_parallel, space);
    before = numbers;
    if (!next_tokens(of, logits, s.V, runs, n >= least, ends, how, numbers ? &*numbers : nullptr, next)) {
      numbers = before;
      break;
    }
    any = false;
    for (int64_t b = 0; b < s.B; ++b) {
      const int64_t best = next[b];
      found.push_back(runs[b] ? best : pad);
      token[b] = runs[b] && best >= 0 ? best : pad;
      runs[b] = runs[b] && best >= 0 && std::find(ends.begin(), ends.end(), best) == ends.end();
      any = any || runs[b];
      ++held[b];
    }
    for (int64_t& at : place) ++at;
  }
  if (state) numbers->store(*state);
  Tensor out = torch::stable::new_empty(lengths, {s.B, n}, ScalarType::Long);
  auto* to = static_cast<int64_t*>(out.mutable_data_ptr());
  for (int64_t i = 0; i < n; ++i)
    for (int64_t b = 0; b < s.B; ++b) to[b * n + i] = found[i * s.B + b];
  return out;
}

STABLE_TORCH_LIBRARY_FRAGMENT(gptneo_fast_csrc, m) {
  m.def("plan(Tensor[] embeddings, Tensor[] blocks, Tensor[] last, Tensor[] scales, int[] windows, float[] eps) -> int");
  m.def("forget_plan(int plan) -> ()");
  m.def(
      "decode(int plan, Tensor x, Tensor? positions, Tensor? types, Tensor(a!)[] keys, Tensor(b!)[] values, Tensor lengths,"
      " Tensor? starts, int keep, int max_lanes=0) -> Tensor");
  m.def(
      "several(int plan, Tensor ids, Tensor positions, Tensor(a!)[] keys, Tensor(b!)[] values, Tensor lengths, Tensor running,"
      " int[] ends, int pad, int least, int steps, Tensor(c!)? state, float temperature, int top_k, float top_p,"
      " int max_lanes=0) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(gptneo_fast_csrc, CPU, m) {
  m.impl("decode", TORCH_BOX(&decode));
  m.impl("several", TORCH_BOX(&several));
}
STABLE_TORCH_LIBRARY_IMPL(gptneo_fast_csrc, CompositeExplicitAutograd, m) {
  m.impl("plan", TORCH_BOX(&make_plan));
  m.impl("forget_plan", TORCH_BOX(&forget_plan));
}

}  // namespace
}  // namespace gptneo_fast
