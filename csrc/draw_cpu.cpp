// The token that torch.multinomial(probabilities, 1) draws on the CPU, from the same state of the same generator.
//
// torch gives every token of the vocabulary a number q of an exponential distribution and takes the largest p / q; at 50,257
// tokens that is a millisecond of logarithms. Here a logarithm is taken only where p / q can still be the largest: q is at
// least the uniform number u that it is made of, so p / u bounds it. Tokens without probability are passed over, and the
// generator (MT19937, two words a number) goes on by as many.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "reading.h"

namespace gptneo_fast {
namespace {

constexpr int N = 624, M = 397;

// How torch.Generator.get_state lays its Mersenne twister out (CPUGeneratorImplStateLegacy); what follows is left alone.
struct State {
  uint64_t seed;
  int32_t left, seeded;
  uint64_t next, words[N];
};

// Matsumoto and Nishimura 1998, as at::mt19937 runs it.
class Twister {
 public:
  explicit Twister(const State& state) : at_(N + 1 - state.left) {
    for (int i = 0; i < N; ++i) words_[i] = static_cast<uint32_t>(state.words[i]);
  }

  void skip(int64_t n) {
    while (n > N - at_) {
      n -= N - at_;
      refresh();
    }
    at_ += static_cast<int>(n);
  }

  // 53 bits of two words, from 0 up to 1: at::uniform_real_distribution<double>.
  double uniform() {
    const uint64_t high = word(), low = word();
    return static_cast<double>((high << 32 | low) & ((uint64_t{1} << 53) - 1)) * 0x1p-53;
  }

  void store(State& state) const {
    for (int i = 0; i < N; ++i) state.words[i] = words_[i];
    state.left = N + 1 - at_;
    state.next = static_cast<uint64_t>(at_);
  }

 private:
  static uint32_t twist(uint32_t u, uint32_t v) {
    return (((u & 0x80000000u) | (v & 0x7fffffffu)) >> 1) ^ (v & 1 ? 0x9908b0dfu : 0);
  }

  void refresh() {
    uint32_t* p = words_;
    for (int i = 0; i < N - M; ++i) p[i] = p[i + M] ^ twist(p[i], p[i + 1]);
    for (int i = N - M; i < N - 1; ++i) p[i] = p[i + M - N] ^ twist(p[i], p[i + 1]);
    p[N - 1] = p[M - 1] ^ twist(p[N - 1], p[0]);
    at_ = 0;
  }

  uint32_t word() {
    if (at_ == N) refresh();
    uint32_t y = words_[at_++];
    y ^= y >> 11;
    y ^= (y << 7) & 0x9d2c5680u;
    y ^= (y << 15) & 0xefc60000u;
    return y ^ (y >> 18);
  }

  uint32_t words_[N];
  int at_;  // of the next word; N: new ones are due
};

int64_t draw_row(const float* p, int64_t V, Twister& numbers) {
  int64_t chosen = 0, passed = 0;
  float most = -1;
  for (int64_t i = 0; i < V; ++i) {
    if (p[i] == 0) {
      ++passed;
      continue;
    }
    numbers.skip(2 * passed);
    passed = 0;
    const double u = numbers.uniform();
    if (static_cast<double>(p[i]) < 0.999999 * most * u) continue;  // further from a tie than floats round
    const float share = p[i] / static_cast<float>(-1.0 * std::log1p(-u));
    if (share > most) {  // of equals the first
      most = share;
      chosen = i;
    }
  }
  numbers.skip(2 * passed);
  return chosen;
}

// int64 [B] of float32 [B, V], all finite and none negative, some above 0 in each row. state: the bytes of get_state, which
// become those after the draw.
Tensor draw(const Tensor& probabilities, Tensor state) {
  if (probabilities.dim() != 2 || probabilities.scalar_type() != ScalarType::Float || !probabilities.is_cpu() ||
      !probabilities.is_contiguous() || probabilities.size(1) < 1)
    refuse("probabilities are ", shape(probabilities), ", but must be contiguous float32 [B, V] on the CPU");
  if (state.scalar_type() != ScalarType::Byte || !state.is_contiguous() || !state.is_cpu() ||
      state.numel() < static_cast<int64_t>(sizeof(State)))
    refuse("state is ", shape(state), ", but must be what a torch.Generator of the CPU gives");
  State held;
  std::memcpy(&held, state.const_data_ptr(), sizeof(State));
  if (held.left < 1 || held.left > N) refuse("state has ", held.left, " words left, but must have 1 to ", N);
  Twister numbers(held);
  const int64_t B = probabilities.size(0), V = probabilities.size(1);
  Tensor tokens = torch::stable::new_empty(probabilities, {B}, ScalarType::Long);
  auto* out = static_cast<int64_t*>(tokens.mutable_data_ptr());
  const auto* p = static_cast<const float*>(probabilities.const_data_ptr());
  for (int64_t b = 0; b < B; ++b) out[b] = draw_row(p + b * V, V, numbers);
  numbers.store(held);
  std::memcpy(state.mutable_data_ptr(), &held, sizeof(State));
  return tokens;
}

STABLE_TORCH_LIBRARY_FRAGMENT(gptneo_fast_csrc, m) { m.def("draw(Tensor probabilities, Tensor(a!) state) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(gptneo_fast_csrc, CPU, m) { m.impl("draw", TORCH_BOX(&draw)); }

}  // namespace
}  // namespace gptneo_fast
