// Selection: comparisons alone, so exact in any order. Equal values go to the lower index.
#pragma once
#include "abi.h"

// Index of each row's largest value. values: float32. A row with a NaN has the index of its first NaN. Bytes: 4 rows columns.
void argmax(const Matrix& values, int64_t* indices, int threads);

// Indices of the `count` largest values of each row, falling, [rows, count]. count <= columns; no NaN.
// A heap of `count` candidates, the worst on top: columns log(count) comparisons at worst. Bytes: 4 rows columns.
void largest(const Matrix& values, int64_t count, int64_t* indices, int threads);
