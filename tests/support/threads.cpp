// A step, attention and a linear layer on four threads of the standard library, without torch: their bits are those of one
// thread. Built under ThreadSanitizer (tests/support/sanitize.sh), which ends the run where two threads meet in memory.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/decode.h"

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

using namespace gptneo_fast;

namespace {

constexpr int64_t kThreads = 4;

void one(int64_t count, int64_t, void (*task)(int64_t, int64_t, void*), void* context) { task(0, count, context); }

void several(int64_t count, int64_t grain, void (*task)(int64_t, int64_t, void*), void* context) {
  const int64_t pieces = std::max<int64_t>(1, std::min(kThreads, count / grain)), size = (count + pieces - 1) / pieces;
  std::vector<std::thread> team;
  for (int64_t begin = 0; begin < count; begin += size)
    team.emplace_back(task, begin, std::min(count, begin + size), context);
  for (std::thread& thread : team) thread.join();
}

float* arena(int64_t floats) {
  thread_local std::vector<float> memory;
  memory.resize(floats + kPad);
  return memory.data();
}

std::mt19937 generator(1);

std::vector<float> numbers(int64_t count, float scale) {
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> made(count);
  for (float& x : made) x = normal(generator);
  return made;
}

void same(const char* what, const std::vector<float>& alone, const std::vector<float>& together) {
  if (memcmp(alone.data(), together.data(), alone.size() * sizeof(float)) == 0) return;
  printf("%s: four threads give other bits than one\n", what);
  exit(1);
}

constexpr int64_t B = 3, T = 2, H = 4, D = 64, C = H * D, F = 4 * C, V = 3001, P = 64, L = 2, R = 40, S = 150;
const Lanes& lanes = JOIN(lanes_, GPTNEO_FAST_LANES);

std::vector<float> step(Parallel run) {
  generator.seed(2);
  const auto w = numbers(2 * F * C, 0.05f), wte = numbers(V * C, 1), wpe = numbers(P * C, 0.1f);
  auto cache = numbers(2 * L * B * H * R * D, 1);
  std::vector<Layer> layers(L);
  for (int64_t i = 0; i < L; ++i) {
    const auto product = [&](int64_t out, int64_t in, const float* bias) {
      return Product{{&w[i * 100], &w[i * 200], &w[i * 300]}, bias ? 1 : 3, out, in, bias};
    };
    char *keys = reinterpret_cast<char*>(&cache[2 * i * B * H * R * D]),
         *values = reinterpret_cast<char*>(&cache[(2 * i + 1) * B * H * R * D]);
    layers[i] = {{&w[7], &w[9], 1e-5f},  {&w[11], &w[13], 1e-5f}, product(C, C, nullptr), product(C, C, &w[5]),
                 product(F, C, &w[17]),  product(C, F, &w[19]),   keys, values, H * R * D, R * D, D, R, i ? 9 : 0};
  }
  const std::vector<int64_t> ids = {1, 2, 3, 4, 5, 6}, positions = {20, 21};
  const std::vector<int32_t> lengths = {20, 5, 38}, starts = {0, 1, 2};
  const Norm norm = {&w[23], &w[29], 1e-5f};
  const Product head = {{wte.data()}, 1, V, C, nullptr};
  std::vector<float> logits(B * T * V);
  Step s{Number::kFloat32, B, T, H, D, V};
  s.ids = ids.data(), s.positions = positions.data(), s.position_rows = 1;
  s.wte = {{wte.data()}, 1, V, C, nullptr}, s.wpe = wpe.data(), s.layers = layers.data(), s.L = L;
  s.lengths = lengths.data(), s.starts = starts.data(), s.norm = &norm, s.head = &head, s.keep = T, s.out = logits.data();
  std::vector<float> workspace(workspace_floats(s));
  lanes.decode(s, run, workspace.data());
  logits.insert(logits.end(), cache.begin(), cache.end());  // what was appended counts, too
  return logits;
}

std::vector<float> attention(Parallel run) {
  generator.seed(3);
  const auto q = numbers(B * H * S * D, 0.3f), k = numbers(B * H * S * D, 0.3f), v = numbers(B * H * S * D, 1);
  std::vector<float> out(B * S * C);
  const auto heads = [](const std::vector<float>& x) { return Heads{x.data(), H * S * D, S * D, D}; };
  Attention a{Number::kFloat32, B, H, S, D, 0, 33, heads(q), heads(k), heads(v)};
  a.out = out.data();
  lanes.attention(a, run, arena);
  return out;
}

std::vector<float> linear(Parallel run) {
  generator.seed(4);
  const auto x = numbers(5 * C, 1), w = numbers(V * C, 0.1f), b = numbers(V, 1);
  std::vector<float> out(5 * V);
  Linear l{};
  l.number = Number::kFloat32, l.x = x.data(), l.M = 5, l.gelu = true, l.out = out.data();
  l.product = {{w.data()}, 1, V, C, b.data()};
  std::vector<float> workspace(workspace_floats(l));
  lanes.linear(l, run, workspace.data());
  lanes.gelu(Number::kFloat32, out.data(), static_cast<int64_t>(out.size()), run);
  return out;
}

// The same with weights in few bits, of as many rows as are unpacked at a time.
std::vector<float> packed(Number number, Parallel run) {
  generator.seed(5);
  constexpr int64_t M = kManyRows, group = 32;
  const auto x = numbers(M * C, 1), scales = numbers(V * C, 0.1f);
  std::vector<uint8_t> w(V * C), b(4 * V * C);
  for (uint8_t& byte : w) byte = static_cast<uint8_t>(generator());
  for (int64_t i = 0; i < V * C; ++i) memcpy(&b[2 * i], reinterpret_cast<const char*>(&scales[i]) + 2, 2);  // as bfloat16
  const bool nibbles = number == Number::kInt4;
  std::vector<float> out(M * V);
  Linear l{};
  l.number = Number::kFloat32, l.x = x.data(), l.M = M, l.out = out.data();
  l.product = {{w.data()}, 1, V, C, nullptr, number, {nibbles ? static_cast<const void*>(b.data()) : scales.data()},
               nibbles ? group : C, C / 64};
  std::vector<float> workspace(workspace_floats(l));
  lanes.linear(l, run, workspace.data());
  return out;
}

}  // namespace

int main() {
  same("a step", step(one), step(several));
  same("attention", attention(one), attention(several));
  same("a linear layer", linear(one), linear(several));
  for (const Number number : {Number::kInt8, Number::kInt4})
    same("a layer in few bits", packed(number, one), packed(number, several));
  printf("under ThreadSanitizer: %d lanes, four threads give the bits of one\n", GPTNEO_FAST_LANES);
}
