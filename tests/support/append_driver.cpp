// Drives kv_append without torch, for AddressSanitizer and UBSan: every tensor is a heap block of its exact size, every
// stored byte is checked against a plain model of the cache, token by token. Linked with csrc/kv_append_cpu.cpp, or with
// the CUDA side in its place (cuda_on_host/). Arguments: calls, and large ones among them. Prints their number.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "../../csrc/kv_append.h"

using namespace gptneo_fast;

namespace {

struct Block {  // [B, H, tokens, row] bytes, heads inside tokens where `merged` (a view of [B, T, H * D])
  Block(int B, int H, int tokens, int row, bool merged, std::mt19937& random) : size(size_t(B) * H * tokens * row) {
    bytes.reset(new char[size]);
    for (size_t i = 0; i < size; ++i) bytes[i] = char(random());
    strides = merged ? Heads{bytes.get(), int64_t(tokens) * H * row, row, int64_t(H) * row, 0}
                     : Heads{bytes.get(), int64_t(H) * tokens * row, int64_t(tokens) * row, row, 0};
  }
  char* at(int b, int h, int t) const { return bytes.get() + b * strides.batch + h * strides.head + t * strides.token; }
  Heads heads(int width) const { return {strides.data, strides.batch, strides.head, strides.token, width}; }

  size_t size;
  std::unique_ptr<char[]> bytes;
  Heads strides{};
};

int pick(std::mt19937& random, int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); }

void one_call(std::mt19937& random, bool large) {
  const int width = 2 << pick(random, 0, 3), granules = large ? pick(random, 16, 19) : pick(random, 1, 9);
  const int B = large ? 3 : pick(random, 1, 5), H = large ? 16 : pick(random, 1, 4), row = width * granules;
  const int T = large ? pick(random, 390, 520) : pick(random, 1, 40), R = large ? pick(random, 390, 520) : pick(random, 1, 40);
  Block k(B, H, T, row, true, random), v(B, H, T, row, false, random);
  Block k_cache(B, H, R, row, false, random), v_cache(B, H, R, row, false, random);
  std::vector<int32_t> lengths(B), starts(B);
  for (int b = 0; b < B; ++b) {
    lengths[b] = pick(random, 0, 9) ? pick(random, 0, 3 * R) : 2147483647 - T;
    starts[b] = pick(random, 0, T + 1);
  }
  if (pick(random, 0, 7) == 0) lengths[0] = -1;  // nothing may be stored for it
  const bool padded = pick(random, 0, 1);

  std::vector<char> expected_k(k_cache.bytes.get(), k_cache.bytes.get() + k_cache.size);
  std::vector<char> expected_v(v_cache.bytes.get(), v_cache.bytes.get() + v_cache.size);
  for (int b = 0; b < B; ++b) {
    for (int i = padded ? starts[b] : 0; i < T && lengths[b] >= 0; ++i) {  // in order: later tokens overwrite earlier ones
      const int64_t token = int64_t(lengths[b]) + i - (padded ? starts[b] : 0);
      for (int h = 0; h < H; ++h) {
        for (int x = 0; x < row; ++x) {
          const size_t place = ((size_t(b) * H + h) * R + token % R) * row + x;
          expected_k[place] = k.at(b, h, i)[x];
          expected_v[place] = v.at(b, h, i)[x];
        }
      }
    }
  }
  const Append a{k.heads(width), v.heads(width), k_cache.heads(width), v_cache.heads(width),
                 lengths.data(), padded ? starts.data() : nullptr, 1, 1, B, H, T, R, granules, width};
  const int cut = pick(random, 0, B * H);
  append_cpu(a, 0, cut);
  append_cpu(a, cut, B * H);
  for (size_t i = 0; i < k_cache.size; ++i) {
    if (k_cache.bytes[i] != expected_k[i] || v_cache.bytes[i] != expected_v[i]) {
      std::printf("wrong byte %zu: B %d, H %d, T %d, R %d, width %d, granules %d\n", i, B, H, T, R, width, granules);
      std::exit(1);
    }
  }
}

}  // namespace

int main(int, char** arguments) {
  const int calls = std::atoi(arguments[1]), large = std::atoi(arguments[2]);
  std::mt19937 random(0);
  for (int i = 0; i < calls; ++i) one_call(random, i < large);
  std::printf("%d calls\n", calls);
}
