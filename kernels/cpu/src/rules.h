// The rules of the numerics contract that a build may break on purpose, to show that the tests would notice.
// All are kept unless a test compiles the library with one of these macros; nothing else may define them.
#pragma once

#ifdef STAFFETTA_BREAK_LINEAR
constexpr bool kSplitKByRows = true;  // linear: how the sum over k is split depends on the number of rows
#else
constexpr bool kSplitKByRows = false;
#endif

#ifdef STAFFETTA_BREAK_ATTENTION
constexpr bool kSplitByCount = true;  // attention: a number of splits instead of a size
#else
constexpr bool kSplitByCount = false;
#endif

#ifdef STAFFETTA_BREAK_SCALES
constexpr bool kScalePerBatch = true;  // int8: one activation scale for all rows
#else
constexpr bool kScalePerBatch = false;
#endif

#ifdef STAFFETTA_BREAK_TREES
constexpr bool kTreeByThreads = true;  // reductions: as many partial sums as threads
#else
constexpr bool kTreeByThreads = false;
#endif
