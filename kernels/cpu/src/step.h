// A step as one call: a program of operations, made once, over matrices whose numbers of rows come with each call.
//
// It knows the operations and no architecture: which of them run, in what order and on what, is recorded from the
// model's own definition (kernels/cpu/record.py). Each operation is the exported function of abi.h, called with the
// arguments that it would be called with one at a time, so its bits, its checks and its order are the same.
#pragma once
#include "abi.h"

enum OperationKind : int32_t {
  kTakeRows = 0,
  kLinear = 1,
  kRmsNorm = 2,
  kLayerNorm = 3,
  kRotateAndWrite = 4,
  kPagedAttention = 5,
};

// What a matrix has a row for.
enum RowsOf : int32_t { kTokens = 0, kDrawn = 1, kScored = 2, kRowKinds = 3 };

// Where a matrix is.
enum Home : int32_t {
  kFixed = 0,    // where it says, for good: a weight. Absent when data is null.
  kScratch = 1,  // in the call's scratch memory; data is the offset in bytes within its own first row
  kResult = 2,   // a result of the call; likewise
};

struct Operand {
  Matrix matrix;  // rows are the call's, unless it is fixed
  int32_t home, rows_of;
  int64_t result;             // number of the result
  int64_t before[kRowKinds];  // scratch that comes before it: bytes per row of each kind, multiples of 64
};

// One operation; which members it has is beside its kind in step.cpp.
struct StepOperation {
  int32_t kind;
  float epsilon, scale, soft_cap;
  int64_t layer, num_heads, num_positions, window;
  Operand inputs[4], outputs[2];
  PackedWeight weight;
  const float *cosines, *sines;
};

struct StepProgram {
  const StepOperation* operations;
  int64_t num_operations;
};

constexpr int64_t kMaxResults = 2;

// The numbers of a batch follow one another: token_ids, positions, slots [num_tokens each], query_starts
// [num_sequences + 1], context_lens [num_sequences], block_tables [num_sequences, max_blocks], then the rows that are
// drawn from and those that are scored.
struct StepCall {
  const int64_t* numbers;
  int64_t num_rows[kRowKinds];
  int64_t num_sequences, max_blocks;
  Pages pages;           // of the first layer
  int64_t layer_stride;  // from one layer to the next
  char* scratch;         // aligned to 64
  char* results[kMaxResults];
};
