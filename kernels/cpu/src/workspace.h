// Scratch memory that is kept from call to call, per thread and purpose, and only grows. Contents do not survive a call.
#pragma once
#include <cstddef>

enum class Scratch { kShared, kPrivate, kMarks, kCount };

// At least `bytes` bytes, aligned to a cache line. Valid until the same thread asks for the same purpose again.
void* workspace(Scratch purpose, size_t bytes);
