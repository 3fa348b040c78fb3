// What decode_lanes.cpp computes on the CPU, in plain data, free of torch: a step of decoding, linear layers, attention.
// Letters as in gptneo_fast/ops/reference.py; M = B * T rows go through every product.
#pragma once

#include <cstdint>

namespace gptneo_fast {

enum class Number : int32_t { kFloat32, kBFloat16, kFloat16, kInt8, kInt4 };

// Linear layers of one width that read the same rows: [parts * outputs, inputs], row-major.
struct Product {
  const void* weight[3];  // of q, k and v there are three; in few bits in the order of packed.h
  int64_t parts, outputs, inputs;
  const void* bias;  // [outputs], or null
  Number number;     // in few bits, or as everything else
  // In few bits: float32, one a row, or bfloat16, `groups` a row, in the order of the weights; blocks of 64 that a row is.
  const void* scales[3];
  int64_t groups, row_blocks;
};

struct Norm {
  const void *weight, *bias;  // [C]
  float eps;
};

struct Layer {
  Norm ln_1, ln_2;
  Product qkv, out_proj, c_fc, c_proj;
  char *keys, *values;          // [B, H, R, D], the last axis dense
  int64_t batch, head, token;   // strides of both, in numbers
  int64_t R, window;            // slots; columns that a query sees, 0 for all
};

struct Step {
  Number number;  // of all weights, of the cache and of hidden states
  int64_t B, T, H, D, V;
  const int64_t *ids, *types, *positions;  // [B, T], [B, T] or null, [B or 1, T]; null ids: x is given
  int64_t position_rows;
  Product wte;               // [V, C], looked up
  const void *wpe, *x;       // [P, C]; hidden states [B, T, C]
  const Layer* layers;
  int64_t L;
  const int32_t *lengths, *starts;  // [B]; starts may be null
  const Norm* norm;                 // ln_f, or null where hidden states before it are wanted
  const Product* head;              // or null
  int64_t keep;                     // columns, the last ones, that are wanted
  void* out;                        // logits float32 [B, keep, V]; hidden states [B, keep, C] without a head

  int64_t C() const { return H * D; }
};

// One linear layer: [LayerNorm of x] -> weight -> [bias] -> [gelu_new] -> [residual].
struct Linear {
  Number number;  // of all tensors
  const void* x;  // [M, K]
  int64_t M;
  const Norm* norm;  // or null
  Product product;
  bool gelu;
  const void* residual;  // [M, N], or null
  void* out;             // [M, N]
};

// [B, H, tokens, D], the last axis dense; null data for none.
struct Heads {
  const void* data;
  int64_t batch, head, token;  // strides, in numbers
};

// Causal attention of T new tokens to what slots hold and, where k and v are given, to themselves.
struct Attention {
  Number number;
  int64_t B, H, T, D, R, window;         // R slots; columns that a query sees, 0 for all
  Heads q, k, v, keys, values;           // without k and v the slots hold the T new ones, too
  const int32_t *lengths, *starts, *ends;  // [B]; null for 0, 0 and T
  void* out;                             // [B, T, H * D]
};

// Floats of a thread for as long as it does not ask again.
using Workspace = float* (*)(int64_t floats);

// Runs task(begin, end, context) over [0, count) in pieces of at least `grain`, on as many threads as torch has.
using Parallel = void (*)(int64_t count, int64_t grain, void (*task)(int64_t, int64_t, void*), void* context);

// Some of a row's logits: those of neighbouring tokens.
struct Piece {
  const float* at;
  int64_t size;
};

// What there is once for each instruction set: the same code on vectors of as many floats.
struct Lanes {
  void (*decode)(const Step&, Parallel, float* workspace);
  void (*linear)(const Linear&, Parallel, float* workspace);
  void (*attention)(const Attention&, Parallel, Workspace);
  // gelu_new of `count` numbers, in place.
  void (*gelu)(Number, void* numbers, int64_t count, Parallel);
  // Rows [first, first + rows) of weights in few bits as numbers [rows, inputs], which products in float32 are rounded to.
  void (*dequantize)(const Product&, int64_t first, int64_t rows, Number, void* out, Parallel);
  // Of [V] logits and one token: log-probability, rank, entropy, variance of the log-probability.
  void (*statistics)(const Piece* pieces, int64_t count, int64_t token, float* own, int64_t* rank, float* entropy, float* variance);
  // The first of the largest of [V] logits, or -1 where one is not finite.
  int64_t (*likeliest)(const float* logits, int64_t V);
  // See draw_lanes.h.
  int64_t (*at_least)(const float* x, int64_t n, float least, int32_t* places);
  void (*exponentials)(const float* x, int64_t n, float less, float* y);
  void (*twist)(uint32_t* words);
  int64_t (*hopeful)(const float* weights, const uint32_t* words, int64_t n, float bound, int32_t* places);
};

extern const Lanes lanes_4;
#if defined(__x86_64__)
extern const Lanes lanes_8;        // AVX2
extern const Lanes lanes_16;       // AVX-512
extern const Lanes lanes_16_vnni;  // AVX-512 with its products of small integers
#endif

constexpr int64_t kMaxRows = 32;   // M; a blocked GEMM reads weights seldom enough with more
constexpr int64_t kManyRows = 64;  // that weights in few bits are unpacked for at a time
constexpr int64_t kMaxHeadDim = 512;
constexpr int64_t kPad = 16;      // rows of the workspace begin at multiples of it and end with zeros

constexpr int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

// Of q, k and v together, or of the MLP's inner rows, which take the same place.
inline int64_t inner_width(const Step& s) {
  int64_t width = 3 * s.C();
  for (int64_t i = 0; i < s.L; ++i) width = s.layers[i].c_fc.outputs > width ? s.layers[i].c_fc.outputs : width;
  return width;
}

// Floats that M rows take in 16 bits, with a scale a block and what two scales of weights ask for; none where those are floats.
inline int64_t rounded_floats(const Product& p, int64_t M) {
  if (p.number != Number::kInt8 && p.number != Number::kInt4) return 0;
  const int64_t blocks = (p.inputs + 63) / 64;
  return M * (3 + 32) * blocks;
}

// Floats of a workspace: residual stream, normalised rows, what a product gives, inner rows, scores of every head, and rows in
// 16 bits.
inline int64_t workspace_floats(const Step& s) {
  int64_t slots = 0, rounded = 0;
  const auto look = [&](const Product& p) {
    const int64_t floats = rounded_floats(p, s.B * s.T);
    rounded = floats > rounded ? floats : rounded;
  };
  for (int64_t i = 0; i < s.L; ++i) {
    const Layer& l = s.layers[i];
    slots = l.R > slots ? l.R : slots;
    look(l.qkv), look(l.out_proj), look(l.c_fc), look(l.c_proj);
  }
  if (s.head) look(*s.head);
  return s.B * s.T * (3 * padded(s.C()) + padded(inner_width(s))) + s.B * s.H * padded(slots) + rounded;
}

// Of a linear layer: x, x normalised, what the product gives, and rows in 16 bits.
inline int64_t workspace_floats(const Linear& l) {
  return l.M * (2 * padded(l.product.inputs) + padded(l.product.outputs)) + rounded_floats(l.product, l.M);
}

}  // namespace gptneo_fast
