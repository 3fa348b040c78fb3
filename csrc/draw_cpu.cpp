// torch.multinomial(probabilities, 1) gives every token of the vocabulary a number q of an exponential distribution and takes
// the largest p / q; at 50,257 tokens that is a millisecond of logarithms. Here a logarithm is taken only where p / q can still
// be the largest: q is at least the uniform number u that it is made of, so p / u bounds it. The generator goes on by two words
// a token all the same.
//
// p / q compares as e^x / q does, so nothing is normalised. What is computed here differs from torch's by roundings: where two
// tokens are no further apart than these, it is not decided here.
#include "draw.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "running.h"

namespace gptneo_fast {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Relative errors, several times those that were seen: of a quotient e^x / q (two e^x of 2 ulp, three more roundings), and of
// a sum of probabilities (torch's errs by 2e-7 to 5e-7 over 97 to 50,257 of them).
constexpr float kQuotient = 4e-6f;
constexpr double kSum = 2e-6;

// How torch.Generator.get_state lays its Mersenne twister out (CPUGeneratorImplStateLegacy); what follows is left alone.
struct State {
  uint64_t seed;
  int32_t left, seeded;
  uint64_t next, words[Twister::kWords];
};

State read_state(const Tensor& state) {
  if (state.scalar_type() != ScalarType::Byte || !state.is_contiguous() || !state.is_cpu() ||
      state.numel() < static_cast<int64_t>(sizeof(State)))
    refuse("state is ", shape(state), ", but must be what a torch.Generator of the CPU gives");
  State held;
  std::memcpy(&held, state.const_data_ptr(), sizeof(State));
  if (held.left < 1 || held.left > Twister::kWords)
    refuse("state has ", held.left, " words left, but must have 1 to ", Twister::kWords);
  return held;
}

// Of weights [n] the largest weight / q, and the next to it.
struct Race {
  int64_t first = 0;
  float most = 0, next = 0;

  void enter(int64_t i, float weight, double u) {
    if (static_cast<double>(weight) < 0.999 * most * u) return;
    const float share = weight / static_cast<float>(-1.0 * std::log1p(-u));
    if (share > most) {  // of equals the first
      next = most;
      most = share;
      first = i;
    } else if (share > next) {
      next = share;
    }
  }
};

// Of all tokens of the vocabulary.
Race race(const Lanes& of, const float* weights, int64_t V, Twister& numbers) {
  Race found;
  int32_t hopeful[Twister::kWords / 2];
  for (int64_t v = 0; v < V;) {
    int64_t count;
    const uint32_t* words = numbers.left(&count);
    count = std::min(count / 2, V - v);
    if (count == 0) {  // a number of two runs of words
      const double u = numbers.uniform();
      if (weights[v] != 0) found.enter(v, weights[v], u);
      ++v;
      continue;
    }
    const int64_t hits = of.hopeful(weights + v, words, count, 0.999f * found.most, hopeful);
    int64_t passed = 0;
    for (int64_t h = 0; h < hits; ++h) {
      if (weights[v + hopeful[h]] == 0) continue;
      numbers.skip(2 * (hopeful[h] - passed));
      found.enter(v + hopeful[h], weights[v + hopeful[h]], numbers.uniform());
      passed = hopeful[h] + 1;
    }
    numbers.skip(2 * (count - passed));
    v += count;
  }
  return found;
}

// Of some tokens, in ascending order.
Race race(const std::vector<float>& weights, const std::vector<int32_t>& tokens, int64_t V, Twister& numbers) {
  Race found;
  int64_t passed = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    if (weights[i] == 0) continue;
    numbers.skip(2 * (tokens[i] - passed));
    found.enter(i, weights[i], numbers.uniform());
    passed = tokens[i] + 1;
  }
  numbers.skip(2 * (V - passed));
  return found;
}

// Tokens in ascending order, their scores, and e^(score - the largest) or, of those that are cut, 0.
struct Kept {
  std::vector<int32_t> tokens, room, steps;
  std::vector<float> scores, weights, spare;

  // The k largest of logits / temperature, and what ties with the last.
  void take_top(const Lanes& of, const float* logits, int64_t V, float temperature, int64_t k) {
    float least = guess(logits, V, k);
    for (;; least = -kInfinity) {
      if (static_cast<int64_t>(room.size()) < V) room.resize(V);
      tokens.assign(room.begin(), room.begin() + of.at_least(logits, V, least, room.data()));
      if (static_cast<int64_t>(tokens.size()) < k) continue;
      scores.resize(tokens.size());
      for (size_t i = 0; i < tokens.size(); ++i) scores[i] = logits[tokens[i]] / temperature;
      spare = scores;
      std::nth_element(spare.begin(), spare.begin() + (k - 1), spare.end(), std::greater<float>());
      const float last = spare[k - 1];
      if (least != -kInfinity && !(last > least / temperature)) continue;  // may tie with some that were left out
      size_t n = 0;
      for (size_t i = 0; i < tokens.size(); ++i)
        if (scores[i] >= last) tokens[n] = tokens[i], scores[n++] = scores[i];
      tokens.resize(n), scores.resize(n);
      return;
    }
  }

  void take_all(const float* logits, int64_t V, float temperature) {
    tokens.resize(V);
    std::iota(tokens.begin(), tokens.end(), 0);
    scores.assign(logits, logits + V);
    if (temperature != 1)
      for (float& score : scores) score /= temperature;
  }

  // False where the largest score is infinite.
  bool weigh(const Lanes& of) {
    weights.resize(scores.size());
    top = *std::max_element(scores.begin(), scores.end());
    of.exponentials(scores.data(), static_cast<int64_t>(scores.size()), top, weights.data());
    return std::isfinite(top);
  }

  // The likeliest tokens, without those whose probabilities, from the least on, add up to no more than 1 - top_p. False where
  // rounding decides.
  bool cut(double top_p) {
    steps.resize(scores.size());
    for (size_t i = 0; i < scores.size(); ++i) {
      const float down = (top - scores[i]) * 32;
      steps[i] = static_cast<int32_t>(down < kSteps - 1 ? down : kSteps - 1);
    }
    mass.assign(kSteps, 0);
    for (size_t i = 0; i < scores.size(); ++i) mass[steps[i]] += weights[i];
    const double limit = (1 - top_p) * std::accumulate(mass.begin(), mass.end(), 0.0);
    double gone = 0;
    int last = kSteps - 1;  // of the steps, the one in which the limit is reached
    for (; last > 0 && gone + mass[last] <= limit * (1 - kSum); --last) gone += mass[last];
    edge.clear();
    for (size_t i = 0; i < scores.size(); ++i)
      if (steps[i] == last) edge.emplace_back(scores[i], weights[i]);
    std::sort(edge.begin(), edge.end());
    size_t first = 0;  // that stays; the likeliest does in any case
    for (; last > 0 || first + 1 < edge.size(); ++first) {
      if (first == edge.size()) return false;
      gone += edge[first].second;
      if (gone > limit * (1 + kSum)) break;
      if (gone > limit * (1 - kSum)) return false;
    }
    if (first > 0 && edge[first - 1].first == edge[first].first) return false;  // by torch's order of equals
    const float least = edge[first].first;
    for (size_t i = 0; i < scores.size(); ++i) weights[i] = scores[i] < least ? 0 : weights[i];
    return true;
  }

 private:
  static constexpr int kSteps = 32 * 96;  // each of 1/32, from the largest score down
  float top = 0;
  std::vector<double> mass;
  std::vector<std::pair<float, float>> edge;

  // A number that somewhat more than k of the logits are likely to reach.
  float guess(const float* logits, int64_t V, int64_t k) {
    const int64_t stride = std::max<int64_t>(1, V / 1024), count = V / stride, rank = 2 * k / stride + 8;
    if (rank >= count) return -kInfinity;
    spare.resize(count);
    for (int64_t i = 0; i < count; ++i) spare[i] = logits[i * stride];
    std::nth_element(spare.begin(), spare.begin() + rank, spare.end(), std::greater<float>());
    return spare[rank];
  }
};

}  // namespace

Twister::Twister(const Lanes& of, const Tensor& state) : of_(&of) {
  const State held = read_state(state);
  for (int i = 0; i < kWords; ++i) words_[i] = static_cast<uint32_t>(held.words[i]);
  at_ = kWords + 1 - held.left;
}

void Twister::store(Tensor state) const {
  State held = read_state(state);
  for (int i = 0; i < kWords; ++i) held.words[i] = words_[i];
  held.left = kWords + 1 - at_;
  held.next = static_cast<uint64_t>(at_);
  std::memcpy(state.mutable_data_ptr(), &held, sizeof(State));
}

void Twister::skip(int64_t n) {
  while (n > kWords - at_) {
    n -= kWords - at_;
    of_->twist(words_);
    at_ = 0;
  }
  at_ += static_cast<int>(n);
}

const uint32_t* Twister::left(int64_t* count) const {
  *count = kWords - at_;
  return words_ + at_;
}

uint32_t Twister::word() {
  if (at_ == kWords) {
    of_->twist(words_);
    at_ = 0;
  }
  uint32_t y = words_[at_++];
  y ^= y >> 11;
  y ^= (y << 7) & 0x9d2c5680u;
  y ^= (y << 15) & 0xefc60000u;
  return y ^ (y >> 18);
}

double Twister::uniform() {
  const uint64_t high = word(), low = word();
  return static_cast<double>((high << 32 | low) & ((uint64_t{1} << 53) - 1)) * 0x1p-53;
}

Draws::Draws(double temperature, int64_t k, double p) : temperature(static_cast<float>(temperature)), top_k(k), top_p(p) {
  if (!(temperature > 0) || k < 0 || !(p >= 0 && p <= 1))
    refuse("temperature ", temperature, ", top_k ", k, " and top_p ", p, " must be above 0, from 0, and from 0 to 1");
}

int64_t draw(const Lanes& of, const Draws& how, const float* logits, int64_t V, Twister& numbers) {
  if (how.temperature == 0 || how.temperature == kInfinity) return -1;  // no float, with which scores are no numbers
  thread_local Kept kept;
  const bool few = how.top_k > 0 && how.top_k < V;
  few ? kept.take_top(of, logits, V, how.temperature, how.top_k) : kept.take_all(logits, V, how.temperature);
  if (!kept.weigh(of) || (how.top_p < 1 && !kept.cut(how.top_p))) return -1;
  const Race found = few ? race(kept.weights, kept.tokens, V, numbers) : race(of, kept.weights.data(), V, numbers);
  return found.next > found.most * (1 - kQuotient) ? -1 : kept.tokens[found.first];
}

namespace {

// int64 [B] of float32 [B, V], all finite and none negative, some above 0 in each row; exactly as torch.multinomial does it.
// state: the bytes of get_state, which become those after the draw.
Tensor multinomial(const Tensor& probabilities, Tensor state, int64_t max_lanes) {
  if (probabilities.dim() != 2 || probabilities.scalar_type() != ScalarType::Float || !probabilities.is_cpu() ||
      !probabilities.is_contiguous() || probabilities.size(1) < 1)
    refuse("probabilities are ", shape(probabilities), ", but must be contiguous float32 [B, V] on the CPU");
  const Lanes& of = lanes_of(max_lanes);
  Twister numbers(of, state);
  const int64_t B = probabilities.size(0), V = probabilities.size(1);
  Tensor tokens = torch::stable::new_empty(probabilities, {B}, ScalarType::Long);
  auto* out = static_cast<int64_t*>(tokens.mutable_data_ptr());
  const auto* p = static_cast<const float*>(probabilities.const_data_ptr());
  for (int64_t b = 0; b < B; ++b) out[b] = race(of, p + b * V, V, numbers).first;
  numbers.store(state);
  return tokens;
}

// int64 [B] of finite logits, float32 [B, V] with dense rows; [0], and the state as it was, where rounding decides.
Tensor choose(const Tensor& logits, Tensor state, double temperature, int64_t top_k, double top_p, int64_t max_lanes) {
  if (logits.dim() != 2 || logits.scalar_type() != ScalarType::Float || !logits.is_cpu() || logits.size(1) < 1 ||
      (logits.stride(1) != 1 && logits.size(1) > 1))
    refuse("logits are ", shape(logits), ", but must be float32 [B, V] on the CPU, the last axis dense");
  const Draws how(temperature, top_k, top_p);
  const Lanes& of = lanes_of(max_lanes);
  Twister numbers(of, state);
  const int64_t B = logits.size(0), V = logits.size(1);
  std::vector<int64_t> found(B);
  for (int64_t b = 0; b < B; ++b) {
    found[b] = draw(of, how, static_cast<const float*>(logits.const_data_ptr()) + b * logits.stride(0), V, numbers);
    if (found[b] < 0) return torch::stable::new_empty(logits, {0}, ScalarType::Long);
  }
  Tensor tokens = torch::stable::new_empty(logits, {B}, ScalarType::Long);
  std::copy(found.begin(), found.end(), static_cast<int64_t*>(tokens.mutable_data_ptr()));
  numbers.store(state);
  return tokens;
}

STABLE_TORCH_LIBRARY_FRAGMENT(gptneo_fast_csrc, m) {
  m.def("multinomial(Tensor probabilities, Tensor(a!) state, int max_lanes=0) -> Tensor");
  m.def("choose(Tensor logits, Tensor(a!) state, float temperature, int top_k, float top_p, int max_lanes=0) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(gptneo_fast_csrc, CPU, m) {
  m.impl("multinomial", TORCH_BOX(&multinomial));
  m.impl("choose", TORCH_BOX(&choose));
}

}  // namespace
}  // namespace gptneo_fast
