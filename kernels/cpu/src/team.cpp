#include "team.h"

#include <immintrin.h>
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace {

constexpr std::chrono::microseconds kSpin{100};  // longer than any pause within a step, shorter than one between steps
constexpr int kPausesPerLook = 16;               // at the clock

// Spins until is_done() or for kSpin; returns is_done().
template <class Condition>
bool spin(const Condition& is_done) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int pause = 0; pause < kPausesPerLook; ++pause) {
      if (is_done()) return true;
      _mm_pause();
    }
  } while (std::chrono::steady_clock::now() < end);
  return is_done();
}

// No signal is delivered to a member: handlers are the business of the threads that installed them.
class NoSignals {
 public:
  NoSignals() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~NoSignals() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_;
};

// One caller's threads. The gate says everything about the work at hand: its number, whether members may still begin,
// and how many are at it. Whoever changes what a sleeper waits for looks for sleepers after that, and a sleeper looks
// once more after it has said that it sleeps; both in one order that all threads see.
class Team {
 public:
  // `num_guests`, 0 or 1, of the threads that a call asks for are nobody's here: they come when they like, see `assist`.
  explicit Team(int num_guests = 0) : num_guests_(num_guests) {}
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  ~Team() {
    is_over_.store(true);
    open();
    for (std::thread& member : members_) member.join();
  }

  void run(int threads, void (*work)(void*), void* context) {
    grow(threads);
    threads_.store(threads, std::memory_order_release);
    work_ = work;
    context_ = context;
    error_ = nullptr;
    open();
    try {
      work(context);
    } catch (...) {
      close();
      throw;
    }
    close();
    if (error_) std::rethrow_exception(error_);
  }

  // The guest's part, on its own thread: works with the others until is_done, which `tell` is called after.
  void assist(const std::atomic<int32_t>& is_done) {
    for (uint64_t seen = number(gate_.load()) - 1;;) {
      wait_until([&] { return is_done.load() || is_after(seen); });
      if (is_done.load()) return;
      take_part_after(seen, kGuest);
    }
  }

  // Has the guest look again whether it is done.
  void tell() {
    if (num_sleeping_.load() == 0) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    opened_.notify_all();
  }

 private:
  static constexpr int kGuest = 1;  // its index
  static constexpr uint64_t kInside = 1;  // a member at work; less than 2^15 of them
  static constexpr uint64_t kOpen = uint64_t{1} << 15;
  static constexpr uint64_t kNumber = uint64_t{1} << 16;

  static uint64_t number(uint64_t gate) { return gate / kNumber; }
  static uint64_t num_inside(uint64_t gate) { return gate % kOpen; }

  void grow(int threads) {
    const int num_members = threads - 1 - num_guests_;
    if (static_cast<int>(members_.size()) >= num_members) return;
    const NoSignals blocked;
    members_.reserve(num_members);
    while (static_cast<int>(members_.size()) < num_members) {
      const int index = static_cast<int>(members_.size()) + 1 + num_guests_;
      members_.emplace_back([this, index, seen = number(gate_.load())] { serve(index, seen); });
    }
  }

  // Lets members begin the next work.
  void open() {
    gate_.store((number(gate_.load(std::memory_order_relaxed)) + 1) * kNumber + kOpen);
    tell();
  }

  // Lets no more members begin, and waits for those who did.
  void close() {
    gate_.fetch_and(~kOpen);
    const auto all_left = [&] { return num_inside(gate_.load(std::memory_order_acquire)) == 0; };
    if (spin(all_left)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    is_caller_sleeping_.store(true);
    left_.wait(lock, [&] { return num_inside(gate_.load()) == 0; });
    is_caller_sleeping_.store(false);
  }

  // A member's life. `seen` is the number of the last work that it need not look at.
  void serve(int index, uint64_t seen) {
    pthread_setname_np(pthread_self(), "kernels");
    for (;;) {
      wait_until([&] { return is_after(seen); });
      if (is_over_.load()) return;
      take_part_after(seen, index);
    }
  }

  // Whether there is, or was, work after that of the number `seen`.
  bool is_after(uint64_t seen) const { return number(gate_.load()) != seen; }

  template <class Condition>
  void wait_until(const Condition& is_met) {
    if (spin(is_met)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    num_sleeping_.fetch_add(1);
    opened_.wait(lock, is_met);
    num_sleeping_.fetch_sub(1);
  }

  // Takes part in the work at hand if it can still be entered; its number is `seen` from now on.
  void take_part_after(uint64_t& seen, int index) {
    const uint64_t gate = gate_.load(std::memory_order_acquire);
    seen = number(gate);
    // Of another work the number of threads may already be, but then this one can no longer be entered.
    if (index < threads_.load(std::memory_order_acquire) && enter(gate)) take_part();
  }

  // Whether this member may begin the work that `gate` tells of.
  bool enter(uint64_t gate) {
    const uint64_t work = number(gate);
    while (gate & kOpen && number(gate) == work)
      if (gate_.compare_exchange_weak(gate, gate + kInside, std::memory_order_acq_rel, std::memory_order_acquire))
        return true;
    return false;
  }

  void take_part() {
    try {
      work_(context_);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
    }
    const uint64_t before = gate_.fetch_sub(kInside);
    if (num_inside(before) > 1 || before & kOpen || !is_caller_sleeping_.load()) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    left_.notify_one();
  }

  const int num_guests_;
  alignas(64) std::atomic<uint64_t> gate_{0};
  // Written by the caller before it opens the gate, or under the mutex.
  std::atomic<int> threads_{0};
  void (*work_)(void*) = nullptr;
  void* context_ = nullptr;
  std::exception_ptr error_;
  std::atomic<bool> is_over_{false};

  alignas(64) std::mutex mutex_;
  std::condition_variable opened_, left_;
  std::atomic<int> num_sleeping_{0};
  std::atomic<bool> is_caller_sleeping_{false};
  std::vector<std::thread> members_;
};

thread_local std::unique_ptr<Team> team;
thread_local Team* lent_team = nullptr;  // a driver's, in place of one of its own

}  // namespace

// A thread that carries out errands in order, with a team whose guest is whoever began them.
class Driver {
 public:
  Driver() {
    const NoSignals blocked;
    thread_ = std::thread([this] { serve(); });
  }
  Driver(const Driver&) = delete;
  Driver& operator=(const Driver&) = delete;

  ~Driver() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      is_over_.store(true);
    }
    came_.notify_one();
    thread_.join();
  }

  void begin(Errand& errand) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      errands_.push_back(&errand);
      num_errands_.store(errands_.size());
    }
    came_.notify_one();
  }

  // Nothing happens in a forked child, where nobody carries it out.
  void finish(const Errand& errand) {
    if (process_ == getpid()) team_.assist(errand.is_done);
  }

 private:
  void serve() {
    pthread_setname_np(pthread_self(), "kernels");
    lent_team = &team_;
    while (Errand* errand = next()) {
      errand->work(*errand);
      errand->is_done.store(1);  // from now on it may be gone
      team_.tell();
    }
  }

  // Waits for the next errand; null when there are no more, for good.
  Errand* next() {
    spin([&] { return num_errands_.load() > 0 || is_over_.load(); });
    std::unique_lock<std::mutex> lock(mutex_);
    came_.wait(lock, [&] { return !errands_.empty() || is_over_.load(); });
    if (errands_.empty()) return nullptr;
    Errand* const errand = errands_.front();
    errands_.pop_front();
    num_errands_.store(errands_.size());
    return errand;
  }

  const pid_t process_ = getpid();
  Team team_{1};
  std::mutex mutex_;
  std::condition_variable came_;
  std::deque<Errand*> errands_;
  std::atomic<size_t> num_errands_{0};  // as many as errands_ has, for who spins
  std::atomic<bool> is_over_{false};
  std::thread thread_;
};

namespace {

thread_local std::unique_ptr<Driver> driver;

// A forked child has none of the threads: what is left of them must be neither used nor joined.
void forget_threads() {
  static_cast<void>(team.release());
  static_cast<void>(driver.release());
}

[[maybe_unused]] const int is_registered = pthread_atfork(nullptr, nullptr, forget_threads);

}  // namespace

void run_on_team(int threads, void (*work)(void*), void* context) {
  if (lent_team) return lent_team->run(threads, work, context);
  if (!team) team = std::make_unique<Team>();
  team->run(threads, work, context);
}

void begin_beside(Errand& errand) {
  if (!driver) driver = std::make_unique<Driver>();
  errand.is_done.store(0);
  errand.driver = driver.get();
  errand.driver->begin(errand);
}

void finish_beside(const Errand& errand) {
  if (!errand.is_done.load()) errand.driver->finish(errand);
}
