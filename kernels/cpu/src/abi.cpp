// The exported functions: check what only the data can tell, then hand over to the instruction set's kernels.
#include "abi.h"

#include <cpuid.h>

#include <cstring>
#include <new>
#include <system_error>

#include "pack.h"

namespace {

const Kernels& kernels_of(int32_t set) {
  switch (set) {
    case kAvx512Bf16: return kernels_avx512bf16;
    case kAvx512: return kernels_avx512;
    case kAvx2: return kernels_avx2;
    default: return kernels_scalar;
  }
}

bool are_within(const int64_t* indices, int64_t count, int64_t limit) {
  for (int64_t i = 0; i < count; ++i)
    if (indices[i] < 0 || indices[i] >= limit) return false;
  return true;
}

struct Registers {
  unsigned a, b, c, d;
};

bool has_cpuid_bit(unsigned leaf, unsigned subleaf, unsigned Registers::*which, int bit) {
  Registers r;
  return __get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d) && (r.*which >> bit & 1);
}

// Runs f; a lack of memory for scratch or of threads becomes a Status, because no exception may cross the C interface.
template <class F>
int32_t guarded(F f) {
  try {
    f();
    return kOk;
  } catch (const std::bad_alloc&) {
    return kOutOfMemory;
  } catch (const std::system_error&) {
    return kNoThreads;
  }
}

}  // namespace

extern "C" {

int32_t staffetta_abi_version() { return STAFFETTA_ABI_VERSION; }

// The best instruction set that this processor and operating system have. The bfloat16 dot product counts on AMD alone:
// Intel's cores without matrix units issue it at half the rate of the fused multiply-add, which gains nothing.
int32_t staffetta_instruction_set() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !has_cpuid_bit(1, 0, &Registers::c, 29))
    return kScalar;  // bit 29: F16C
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (!has_avx512 || !has_cpuid_bit(7, 0, &Registers::c, 11)) return kAvx2;  // bit 11: VNNI
  const bool has_fast_bf16 = __builtin_cpu_is("amd") && has_cpuid_bit(7, 1, &Registers::a, 5);
  return has_fast_bf16 ? kAvx512Bf16 : kAvx512;
}

int64_t staffetta_packed_bytes(int32_t kind, int64_t outputs, int64_t inputs) {
  return packed_bytes(kind, outputs, inputs);
}

int32_t staffetta_pack(int32_t kind, const Matrix* weight, void* panels, float* scales, int32_t* sums,
                       int32_t threads) {
  return guarded([&] { pack(kind, *weight, panels, scales, sums, threads); });
}

int32_t staffetta_linear(int32_t set, int32_t threads, const PackedWeight* weight, const Matrix* x,
                         const Matrix* residual, const Matrix* out) {
  return guarded([&] { kernels_of(set).linear(*weight, *x, *residual, *out, threads); });
}

// The layer for whoever looks for the largest output of each row alone: others may be the least finite number instead of
// what they are. It is not gated and has no bias; out is float32.
int32_t staffetta_largest(int32_t set, int32_t threads, const PackedWeight* weight, const Screen* screen,
                          const Matrix* x, const Matrix* out) {
  return guarded([&] { kernels_of(set).largest(*weight, *screen, *x, *out, threads); });
}

int32_t staffetta_attention(int32_t set, int32_t threads, const AttentionArguments* call, const Pages* pages) {
  if (call->dtype != pages->dtype || call->num_heads / pages->num_kv_heads > kMaxGroup) return kUnsupported;
  for (int64_t s = 0; s < call->num_sequences; ++s) {
    const int64_t blocks = (call->context_lens[s] + pages->block_size - 1) / pages->block_size;
    if (call->context_lens[s] < call->query_starts[s + 1] - call->query_starts[s] || blocks > call->max_blocks ||
        !are_within(call->block_tables + s * call->table_stride, blocks, pages->num_blocks))
      return kOutOfRange;
  }
  return guarded([&] { kernels_of(set).attention(*call, *pages, threads); });
}

int32_t staffetta_rms_norm(int32_t set, int32_t threads, const Matrix* x, const Matrix* residual, const Matrix* weight,
                           float eps, const Matrix* sum, const Matrix* out) {
  return guarded([&] { kernels_of(set).rms_norm(*x, *residual, *weight, eps, *sum, *out, threads); });
}

int32_t staffetta_layer_norm(int32_t set, int32_t threads, const Matrix* x, const Matrix* residual,
                             const Matrix* weight, const Matrix* bias, float eps, const Matrix* sum,
                             const Matrix* out) {
  return guarded([&] { kernels_of(set).layer_norm(*x, *residual, *weight, *bias, eps, *sum, *out, threads); });
}

int32_t staffetta_rotate_and_write(int32_t set, int32_t threads, const RotateArguments* call, const Pages* pages,
                                   int64_t num_positions) {
  if (!are_within(call->positions, call->query.rows, num_positions) ||
      !are_within(call->slots, call->query.rows, pages->num_blocks * pages->block_size))
    return kOutOfRange;
  return guarded([&] { kernels_of(set).rotate_and_write(*call, *pages, threads); });
}

int32_t staffetta_log_softmax(int32_t set, int32_t threads, const Matrix* logits, const Matrix* out) {
  return guarded([&] { kernels_of(set).log_softmax(*logits, *out, threads); });
}

int32_t staffetta_sample(int32_t set, int32_t threads, const Matrix* logits, const Draw* draws, int64_t num_draws,
                         const int64_t* token_ids, int64_t* tokens) {
  for (int64_t d = 0; d < num_draws; ++d)
    if (draws[d].row < 0 || draws[d].row >= logits->rows) return kOutOfRange;
  return guarded([&] { kernels_of(set).sample(*logits, draws, num_draws, token_ids, tokens, threads); });
}

int32_t staffetta_score_tokens(int32_t set, int32_t threads, const ScoreArguments* call) {
  if (!are_within(call->rows, call->num_rows, call->logits.rows) ||
      !are_within(call->targets, call->num_rows, call->logits.columns))
    return kOutOfRange;
  return guarded([&] { kernels_of(set).score_tokens(*call, threads); });
}

// Rows of a table: out[t] = table[token_ids[t]]. Bytes: 2 rows columns b.
int32_t staffetta_embedding(const int64_t* token_ids, const Matrix* table, const Matrix* out) {
  if (!are_within(token_ids, out->rows, table->rows)) return kOutOfRange;
  const int64_t bytes = table->dtype == kFloat32 ? 4 : 2;
  for (int64_t t = 0; t < out->rows; ++t)
    std::memcpy(static_cast<char*>(out->data) + t * out->row_stride * bytes,
                static_cast<const char*>(table->data) + token_ids[t] * table->row_stride * bytes,
                static_cast<size_t>(table->columns * bytes));
  return kOk;
}

}  // extern "C"
