// A step as one call: a program of operations, made once, over matrices whose numbers of rows come with each call.
//
// It knows the operations and no architecture: which of them run, in what order and on what, is recorded from the
// model's own definition (kernels/cpu/record.py). Each operation is the exported function of abi.h, called with the
// arguments that it would be called with one at a time, so its bits, its checks and its order are the same.
#pragma once
#include "abi.h"
#include "team.h"

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
  Screen screen;
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

// A step that a driver computes beside whoever began it, up to the tokens that are drawn from its logits.
//
// One that follows another takes its token ids from there, and so can be begun before that one has drawn any. It is not
// computed when that one was not, or lacks a token, or when `num_holds` is another number by the time it is its turn.
struct StepJob {
  Errand errand;
  std::atomic<int32_t> is_unwanted;  // may be set at any time: no further operation is begun
  std::atomic<int32_t> status;       // kNotBegun until its turn
  int32_t set, threads;
  const StepProgram* program;
  const StepCall* call;
  Matrix logits;
  const Draw* draws;
  int64_t num_draws;
  const int64_t* drawn_ids;  // of all draws
  int64_t* tokens;           // [num_draws]; less than 0 where none could be drawn
  const StepJob* before;     // the step that this one follows, or null
  const int64_t* sources;    // [num_rows[kTokens]]: which of its tokens
  int64_t* token_ids;        // [num_rows[kTokens]]: where they go
  const std::atomic<int32_t>* num_holds;
  int32_t num_holds_known;  // to whoever began it
};

enum JobStatus : int32_t { kNotBegun = -2, kBegun = -1 };  // and then a Status
