// Weights into panels of 32 outputs, once, when a model is loaded. Plain C++: exact, and not worth more.
#pragma once
#include "abi.h"

// Bytes that the panels of an [outputs, inputs] weight take.
int64_t packed_bytes(int32_t kind, int64_t outputs, int64_t inputs);

// Writes weight [outputs, inputs] into `panels`; outputs are padded with zeros to whole panels, inputs to whole steps.
//   float32:  [panel][k][32] floats.
//   bfloat16: [panel][k / 2][32] pairs, the earlier input in the high half. weight must be bfloat16.
//   int8:     [panel][k / 4][32][4], symmetric per output: scale = max |w| / 127, q = round(w 127 / max |w|), ties to
//             even; scales and sums [padded outputs] are written too. A weight that is int8 is copied; its scales are the
//             caller's and not written.
//   int8 only: [panel][k][32] bytes. weight must be int8, of which scales and sums are not written.
//   int4:      [panel][k / 8][32] words of four pairs, the first in the lowest bits of both halves, of each pair the
//              earlier input in the high half. weight must be int8, from -8 to 7; scales and sums are not written.
void pack(int32_t kind, const Matrix& weight, void* panels, float* scales, int32_t* sums, int threads);
