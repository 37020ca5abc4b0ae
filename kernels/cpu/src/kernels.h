// All kernels for one instruction set. Included once by each kernels_*.cpp, after its vec_*.h and within its own
// namespace: code that is shared between differently compiled files would be the linker's choice of one of them.
#pragma once
#include "numeric.h"
#include "linear.h"
#include "largest.h"
#include "attention.h"
#include "rows.h"
#include "sample.h"
#include "score.h"

namespace STAFFETTA_ISA {

constexpr Kernels table() {
  return {linear, largest, attention, rms_norm, layer_norm, rotate_and_write, log_softmax, sample, score_tokens};
}

}  // namespace STAFFETTA_ISA
