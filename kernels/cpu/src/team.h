// The threads that compute a call together: work is cut into numbered pieces, and whoever is free takes the next.
//
// Nobody is waited for who has not begun: a thread that sleeps, or that the system runs late, finds the work done and
// goes on waiting, and the caller has done all of it alone. Who has begun is waited for, for the length of a piece.
// Results must not depend on who computes which.
//
// Members spin for a moment when there is nothing to do, so that the hundred and more calls of a step follow each other
// within a microsecond; then they sleep, so that an idle process costs nothing.
#pragma once
#include <atomic>
#include <cstdint>

// Runs work(context) on the calling thread and on up to `threads` - 1 of its team, which grows to that size and lives as
// long as the caller's thread. Returns when all who began are done; an exception of any of them is thrown here. Throws
// std::system_error when a thread cannot be started. Must not be called from within work.
void run_on_team(int threads, void (*work)(void*), void* context);

// Each file that includes this has it compiled for its own instruction set.
namespace {

// Hands out the numbers from 0 to count - 1, each once and in rising order.
class Turns {
 public:
  explicit Turns(int64_t count) : count_(count) {}
  bool take(int64_t& number) { return (number = next_.fetch_add(1, std::memory_order_relaxed)) < count_; }

 private:
  alignas(64) std::atomic<int64_t> next_{0};
  const int64_t count_;
};

constexpr int64_t kSerialElements = 1 << 13;  // to read, compute and write that are not worth sharing
inline int threads_for(int64_t elements, int threads) { return elements > kSerialElements ? threads : 1; }

// Calls work(turns) on up to `threads` threads; each is to take turns until there are none.
template <class Work>
void share_turns(int threads, int64_t count, const Work& work) {
  Turns turns(count);
  if (threads <= 1 || count <= 1) return work(turns);
  const auto take_part = [&] { work(turns); };
  using TakePart = decltype(take_part);
  run_on_team(
      static_cast<int>(threads < count ? threads : count), [](void* context) { (*static_cast<TakePart*>(context))(); },
      const_cast<void*>(static_cast<const void*>(&take_part)));
}

// Calls f(i) for every i below count, in runs of neighbours: a few for each thread, because threads may come late.
template <class F>
void share_loop(int threads, int64_t count, const F& f) {
  const int64_t most_pieces = int64_t{8} * threads, pieces = count < most_pieces ? count : most_pieces;
  share_turns(threads, pieces, [&](Turns& turns) {
    for (int64_t piece; turns.take(piece);)
      for (int64_t i = count * piece / pieces; i < count * (piece + 1) / pieces; ++i) f(i);
  });
}

}  // namespace

class Driver;

// Work for a thread of its own, the driver. It must stay where it is until it is done.
struct Errand {
  void (*work)(Errand&);
  std::atomic<int32_t> is_done;
  Driver* driver;  // its thread's who began it
};

// Has the calling thread's driver carry the errand out after those begun before it, and returns. The driver lives as long
// as the caller's thread. What the work runs on a team is for the driver, its members, and the caller while it is in
// `finish_beside`: together no more threads than a call asks for, which is to be two or more. Throws std::system_error
// when no thread can be started; then nothing has begun.
void begin_beside(Errand& errand);

// Takes part in the work that is under way until the errand is done. On the thread that began it, or on another while
// that one lives and is not in here itself. In a forked child it returns at once.
void finish_beside(const Errand& errand);
