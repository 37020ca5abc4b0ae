#include "workspace.h"

#include <cstdlib>
#include <new>

namespace {

struct Buffer {
  void* data = nullptr;
  size_t bytes = 0;
  ~Buffer() { std::free(data); }
};

thread_local Buffer buffers[static_cast<int>(Scratch::kCount)];

}  // namespace

void* workspace(Scratch purpose, size_t bytes) {
  Buffer& buffer = buffers[static_cast<int>(purpose)];
  if (bytes > buffer.bytes) {
    const size_t rounded = (bytes + (1u << 16) - 1) & ~size_t{(1u << 16) - 1};
    std::free(buffer.data);
    buffer.data = std::aligned_alloc(64, rounded);
    buffer.bytes = buffer.data ? rounded : 0;
    if (!buffer.data) throw std::bad_alloc();
  }
  return buffer.data;
}
