#include "step.h"

#include <algorithm>
#include <new>
#include <system_error>

namespace {

// One call under way: turns operands into matrices, operations into calls.
struct Step {
  int32_t set, threads;
  const StepCall& call;
  const int64_t *token_ids, *positions, *slots, *query_starts, *context_lens, *block_tables, *drawn_rows, *scored_rows;

  Step(int32_t set, int32_t threads, const StepCall& call) : set(set), threads(threads), call(call) {
    const int64_t* next = call.numbers;
    const auto take = [&](int64_t count) { return (next += count) - count; };
    token_ids = take(call.num_rows[kTokens]);
    positions = take(call.num_rows[kTokens]);
    slots = take(call.num_rows[kTokens]);
    query_starts = take(call.num_sequences + 1);
    context_lens = take(call.num_sequences);
    block_tables = take(call.num_sequences * call.max_blocks);
    drawn_rows = take(call.num_rows[kDrawn]);
    scored_rows = take(call.num_rows[kScored]);
  }

  Matrix at(const Operand& operand) const {
    Matrix matrix = operand.matrix;
    if (operand.home == kFixed) return matrix;
    char* base = operand.home == kResult ? call.results[operand.result] : call.scratch;
    for (int kind = 0; kind < kRowKinds; ++kind) base += operand.before[kind] * call.num_rows[kind];
    matrix.data = base + reinterpret_cast<intptr_t>(matrix.data);
    matrix.rows = call.num_rows[operand.rows_of];
    return matrix;
  }

  Pages pages(int64_t layer) const {
    Pages pages = call.pages;
    const int64_t bytes = pages.dtype == kFloat32 ? 4 : 2;
    pages.data = static_cast<char*>(pages.data) + layer * call.layer_stride * bytes;
    return pages;
  }

  // inputs: table. outputs: its rows, by token ids for the tokens' and else by rows of the step.
  int32_t take_rows(const StepOperation& op) const {
    const Matrix table = at(op.inputs[0]), out = at(op.outputs[0]);
    const int64_t* const indices[kRowKinds] = {token_ids, drawn_rows, scored_rows};
    return staffetta_embedding(indices[op.outputs[0].rows_of], &table, &out);
  }

  // inputs: x, residual or absent. outputs: the layer's. weight.
  int32_t linear(const StepOperation& op) const {
    const Matrix x = at(op.inputs[0]), residual = at(op.inputs[1]), out = at(op.outputs[0]);
    return staffetta_linear(set, threads, &op.weight, &x, &residual, &out);
  }

  // The same where only the largest output of each row is looked for. screen.
  int32_t largest(const StepOperation& op) const {
    const Matrix x = at(op.inputs[0]), out = at(op.outputs[0]);
    return staffetta_largest(set, threads, &op.weight, &op.screen, &x, &out);
  }

  // inputs: x, residual or absent, weight. outputs: the norm, the sum with the residual if there is one. epsilon.
  int32_t rms_norm(const StepOperation& op) const {
    const Matrix x = at(op.inputs[0]), residual = at(op.inputs[1]), weight = at(op.inputs[2]);
    const Matrix out = at(op.outputs[0]), sum = at(op.outputs[1]);
    return staffetta_rms_norm(set, threads, &x, &residual, &weight, op.epsilon, &sum, &out);
  }

  // inputs: x, absent, weight, bias or absent. outputs: the norm. epsilon.
  int32_t layer_norm(const StepOperation& op) const {
    const Matrix x = at(op.inputs[0]), residual = at(op.inputs[1]), weight = at(op.inputs[2]), bias = at(op.inputs[3]);
    const Matrix out = at(op.outputs[0]), sum = at(op.outputs[1]);
    return staffetta_layer_norm(set, threads, &x, &residual, &weight, &bias, op.epsilon, &sum, &out);
  }

  // inputs: query, keys, values. outputs: the turned query. layer, cosines, sines, num_positions.
  int32_t rotate_and_write(const StepOperation& op) const {
    const RotateArguments arguments{at(op.inputs[0]), at(op.inputs[1]), at(op.inputs[2]), at(op.outputs[0]),
                                    op.cosines,       op.sines,         positions,         slots};
    const Pages layer = pages(op.layer);
    return staffetta_rotate_and_write(set, threads, &arguments, &layer, op.num_positions);
  }

  // inputs: query. outputs: what it attends to. layer, num_heads, scale, window, soft_cap.
  int32_t paged_attention(const StepOperation& op) const {
    const Matrix query = at(op.inputs[0]), out = at(op.outputs[0]);
    AttentionArguments arguments{};
    arguments.query = query.data;
    arguments.out = out.data;
    arguments.num_heads = op.num_heads;
    arguments.query_token_stride = query.row_stride;
    arguments.query_head_stride = query.columns / op.num_heads;
    arguments.dtype = query.dtype;
    arguments.num_sequences = call.num_sequences;
    arguments.max_blocks = call.max_blocks;
    arguments.table_stride = call.max_blocks;
    arguments.query_starts = query_starts;
    arguments.context_lens = context_lens;
    arguments.block_tables = block_tables;
    arguments.scale = op.scale;
    arguments.window = op.window;
    arguments.soft_cap = op.soft_cap;
    const Pages layer = pages(op.layer);
    return staffetta_attention(set, threads, &arguments, &layer);
  }

  int32_t run(const StepOperation& op) const {
    switch (op.kind) {
      case kTakeRows: return take_rows(op);
      case kLinear: return linear(op);
      case kRmsNorm: return rms_norm(op);
      case kLayerNorm: return layer_norm(op);
      case kRotateAndWrite: return rotate_and_write(op);
      case kPagedAttention: return paged_attention(op);
      default: return kUnsupported;
    }
  }
};

// Puts the tokens of the step before into the numbers of one that follows it. False when it is not to be computed.
bool follow(const StepJob& job) {
  if (job.num_holds->load() != job.num_holds_known || job.before->status.load() != kOk) return false;
  for (int64_t row = 0; row < job.call->num_rows[kTokens]; ++row) {
    const int64_t token = job.before->tokens[job.sources[row]];
    if (token < 0) return false;
    job.token_ids[row] = token;
  }
  return true;
}

// Whether all that is drawn are the largest logits of their rows.
bool draws_largest(const StepJob& job) {
  const auto is_largest = [](const Draw& draw) {
    return draw.temperature == 0 && draw.num_prompt + draw.num_output + draw.num_banned == 0;
  };
  return std::all_of(job.draws, job.draws + job.num_draws, is_largest);
}

int32_t compute(const StepJob& job) {
  const Step step(job.set, job.threads, *job.call);
  const bool asks_largest = draws_largest(job);
  for (int64_t number = 0; number < job.program->num_operations; ++number) {
    if (job.is_unwanted.load(std::memory_order_relaxed)) return kNotRun;
    const StepOperation& op = job.program->operations[number];
    const int32_t status = asks_largest && op.screen.coarse.panels ? step.largest(op) : step.run(op);
    if (status != kOk) return status;
  }
  return staffetta_sample(job.set, job.threads, &job.logits, job.draws, job.num_draws, job.drawn_ids, job.tokens);
}

void run_job(Errand& errand) {
  StepJob& job = reinterpret_cast<StepJob&>(errand);  // its first member
  if (job.before && !follow(job)) {
    job.status.store(kNotRun);
    return;
  }
  job.status.store(kBegun);
  job.status.store(compute(job));
}

}  // namespace

extern "C" {

// Runs the operations in order, up to the first that refuses; its status is returned. Those before it have then been
// done, keys and values included; doing them again writes the same bytes.
int32_t staffetta_step(int32_t set, int32_t threads, const StepProgram* program, const StepCall* call) {
  const Step step(set, threads, *call);
  for (int64_t number = 0; number < program->num_operations; ++number)
    if (const int32_t status = step.run(program->operations[number]); status != kOk) return status;
  return kOk;
}

// For whoever lays jobs and operations out in another language.
int64_t staffetta_step_job_bytes() { return sizeof(StepJob); }
int64_t staffetta_step_operation_bytes() { return sizeof(StepOperation); }

// Has the calling thread's driver compute the step, and returns at once. Everything that the job points to must stay
// until staffetta_step_finish has returned, and what it follows until it is begun.
int32_t staffetta_step_begin(StepJob* job) {
  job->errand.work = run_job;
  job->status.store(kNotBegun);
  try {
    begin_beside(job->errand);
    return kOk;
  } catch (const std::bad_alloc&) {
    return kOutOfMemory;
  } catch (const std::system_error&) {
    return kNoThreads;
  }
}

// Takes part in computing until the step is done; returns the status of the first operation that refused, or kNotRun.
int32_t staffetta_step_finish(StepJob* job) {
  finish_beside(job->errand);
  return job->status.load();
}

}  // extern "C"
