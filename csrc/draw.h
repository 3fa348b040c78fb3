// Tokens drawn from logits on the CPU: those that the warpers and torch.multinomial draw, from the same state of the same
// generator.
#pragma once

#include <cstdint>

#include "decode.h"
#include "reading.h"

namespace gptneo_fast {

// torch's generator: MT19937 of Matsumoto and Nishimura 1998, as at::mt19937 runs it.
class Twister {
 public:
  static constexpr int kWords = 624;

  // state: the bytes of torch.Generator.get_state.
  Twister(const Lanes& of, const Tensor& state);

  // state: becomes that of a generator which has given what was taken of this one.
  void store(Tensor state) const;

  // Take n words, and nothing of them.
  void skip(int64_t n);

  // 53 bits of two words, from 0 up to 1: at::uniform_real_distribution<double>.
  double uniform();

  // Words that are left before new ones are made, as they are before tempering.
  const uint32_t* left(int64_t* count) const;

 private:
  uint32_t word();

  const Lanes* of_;
  uint32_t words_[kWords];
  int at_;  // of the next word; kWords: new ones are due
};

// Of logits / temperature the top_k largest and what ties with the last of them (0: all), of those the likeliest that top_p
// leaves (1: all).
struct Draws {
  float temperature;
  int64_t top_k;
  double top_p;

  Draws(double temperature, int64_t k, double p);
};

// The token drawn of [V] finite logits, some of which may be -inf; -1 where rounding decides between two or a score overflows,
// which is for torch to say, and then the generator is anywhere.
int64_t draw(const Lanes& of, const Draws& how, const float* logits, int64_t V, Twister& numbers);

}  // namespace gptneo_fast
