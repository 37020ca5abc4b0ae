// The C interface: plain pointers, sizes and strides. Every tensor's last dimension is contiguous; strides count
// elements. Every function takes the instruction set and the number of threads to use, neither of which may change a
// bit of the result; a function that can refuse its arguments returns a Status, and then has written nothing.
#pragma once
#include <atomic>
#include <cstdint>

// Grows when the bits of any result may have changed.
#define STAFFETTA_ABI_VERSION 5

enum InstructionSet : int32_t { kScalar = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };
// int8 is for weights alone.
enum DType : int32_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2, kInt8 = 3 };
enum WeightKind : int32_t {
  kWeightFloat32 = 0,
  kWeightBfloat16 = 1,
  kWeightInt8 = 2,      // against rows that are quantized too
  kWeightInt8Only = 3,  // against rows as they are
  kWeightInt4 = 4,      // likewise
};
enum Status : int32_t { kOk = 0, kOutOfRange = 1, kUnsupported = 2, kOutOfMemory = 3, kNoThreads = 4, kNotRun = 5 };

// A matrix of the caller's. data may be null where a function says so.
struct Matrix {
  void* data;
  int64_t rows, columns, row_stride;
  int32_t dtype;
};

// Inputs of an int4 weight that share a scale.
constexpr int64_t kGroupInputs = 64;

// A linear layer's weights in panels of 32 outputs. scales belong to integers, sums to kWeightInt8 alone.
struct PackedWeight {
  const void* panels;
  const float* bias;      // [outputs, padded to 32], or null
  const float* scales;    // [outputs, padded to 32]; int4: [panel][group][32]
  const int32_t* sums;    // [outputs, padded to 32]: the sum of each output's weights
  int64_t inputs, outputs;
  int32_t kind;
  int32_t gated;  // 1: each panel is 16 gate and 16 up rows, and outputs counts both
};

// What tells which outputs of a layer may be the largest of a row: its weights once more, as kWeightInt8Only, and for each
// output, padded to 32, the most by which the two differ for a row of norm 1. Absent when coarse.panels is null.
struct Screen {
  PackedWeight coarse;
  const float* errors;
  std::atomic<int32_t>* num_unasked;  // calls to come that leave it alone; changed by calls, and by them only
};

// Heads that may share a KV head.
constexpr int64_t kMaxGroup = 96;

// Pages of one layer, [num_blocks, num_kv_heads, 2, block_size, head_dim] by strides; data points at the layer.
struct Pages {
  void* data;
  int64_t num_blocks, num_kv_heads, block_size, head_dim;
  int64_t block_stride, head_stride, value_stride, token_stride;
  int32_t dtype;
};

struct AttentionArguments {
  const void* query;  // [num_tokens, num_heads, head_dim]
  void* out;          // same, contiguous
  int64_t num_heads, query_token_stride, query_head_stride;
  int32_t dtype;      // of query and out, that of the pages
  int64_t num_sequences, max_blocks, table_stride;
  const int64_t *query_starts, *context_lens, *block_tables;
  float scale;
  int64_t window;     // keys a query sees, itself included; 0: all
  float soft_cap;     // scores become soft_cap tanh(score / soft_cap); 0: not
};

struct RotateArguments {
  Matrix query, keys, values;  // [num_tokens, heads x head_dim], one dtype, that of the pages
  Matrix out;                  // query's shape
  const float *cosines, *sines;  // [num_positions, head_dim / 2]
  const int64_t *positions, *slots;  // [num_tokens]
};

// One token to draw. Its ids, in the array that all draws share, are those of the prompt, the output and the banned, one
// after another from first_id on.
struct Draw {
  int64_t row, top_k;  // top_k 0: all
  uint64_t seed;
  int64_t first_id, num_prompt, num_output, num_banned;
  double top_p;
  float temperature, repetition, presence, frequency;
  uint32_t choice, output_index;
};
// What stands in the place of a token that could not be drawn.
enum DrawFailure : int64_t { kNotFinite = -1, kAllBanned = -2 };

struct ScoreArguments {
  Matrix logits;                 // float32
  int64_t num_rows, num_top;     // num_top up to the number of columns
  const int64_t *rows, *targets;  // [num_rows]
  float* logprobs;               // [num_rows]
  int64_t* top_ids;              // [num_rows, num_top]
  float* top_logprobs;
};

// The exported functions that a step calls; abi.cpp says what each does.
extern "C" {
int32_t staffetta_embedding(const int64_t* indices, const Matrix* table, const Matrix* out);
int32_t staffetta_linear(int32_t set, int32_t threads, const PackedWeight* weight, const Matrix* x,
                         const Matrix* residual, const Matrix* out);
int32_t staffetta_largest(int32_t set, int32_t threads, const PackedWeight* weight, const Screen* screen,
                          const Matrix* x, const Matrix* out);
int32_t staffetta_rms_norm(int32_t set, int32_t threads, const Matrix* x, const Matrix* residual, const Matrix* weight,
                           float eps, const Matrix* sum, const Matrix* out);
int32_t staffetta_layer_norm(int32_t set, int32_t threads, const Matrix* x, const Matrix* residual,
                             const Matrix* weight, const Matrix* bias, float eps, const Matrix* sum,
                             const Matrix* out);
int32_t staffetta_rotate_and_write(int32_t set, int32_t threads, const RotateArguments* call, const Pages* pages,
                                   int64_t num_positions);
int32_t staffetta_attention(int32_t set, int32_t threads, const AttentionArguments* call, const Pages* pages);
int32_t staffetta_sample(int32_t set, int32_t threads, const Matrix* logits, const Draw* draws, int64_t num_draws,
                         const int64_t* token_ids, int64_t* tokens);
}

// One instruction set's functions, in the order of the sources.
struct Kernels {
  void (*linear)(const PackedWeight&, const Matrix& x, const Matrix& residual, const Matrix& out, int threads);
  void (*largest)(const PackedWeight&, const Screen&, const Matrix& x, const Matrix& out, int threads);
  void (*attention)(const AttentionArguments&, const Pages&, int threads);
  void (*rms_norm)(const Matrix& x, const Matrix& residual, const Matrix& weight, float eps, const Matrix& sum,
                   const Matrix& out, int threads);
  void (*layer_norm)(const Matrix& x, const Matrix& residual, const Matrix& weight, const Matrix& bias, float eps,
                     const Matrix& sum, const Matrix& out, int threads);
  void (*rotate_and_write)(const RotateArguments&, const Pages&, int threads);
  void (*log_softmax)(const Matrix& logits, const Matrix& out, int threads);
  void (*sample)(const Matrix& logits, const Draw* draws, int64_t num_draws, const int64_t* token_ids, int64_t* tokens,
                 int threads);
  void (*score_tokens)(const ScoreArguments&, int threads);
};

extern const Kernels kernels_scalar, kernels_avx2, kernels_avx512, kernels_avx512bf16;
