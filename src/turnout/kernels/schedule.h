// Tasks that threads take one after another, and memory that stays from call to call.
#pragma once

#include <pthread.h>
#include <sched.h>
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <new>
#include <vector>

#include "job.h"
#include "lanes.h"

namespace turnout {

struct Task {
  int kind, index;
  int wait = -1;               // group that must be done before
  int signal = -1;  // group this one belongs to
  int wait_too = -1;
};

// A task waits only for groups whose tasks stand before it, so it never waits for itself, whatever the threads.
class Schedule {
 public:
  int group() {
    left_.push_back(0);
    return int(left_.size()) - 1;
  }
  void add(const Task& task) {
    tasks_.push_back(task);
    if (task.signal >= 0) left_[task.signal]++;
  }
  // work(task, worker) for every task; workers are numbered from 0 to threads - 1.
  template <class Work>
  void run(Work& work, int threads, Parallel parallel) {
    Call<Work> call = {this, &work};
    next_ = workers_ = 0;
    if (threads <= 1) return call.enter(&call);
    if (parallel) return parallel(Call<Work>::enter, &call, threads, 0);
    std::vector<pthread_t> others;
    for (int i = 1; i < threads; i++) {
      pthread_t other;
      if (pthread_create(&other, nullptr, Call<Work>::start, &call) == 0) others.push_back(other);
    }
    call.enter(&call);
    for (pthread_t other : others) pthread_join(other, nullptr);
  }

 private:
  template <class Work>
  struct Call {
    Schedule* schedule;
    Work* work;
    static void enter(void* self) {
      Call& call = *static_cast<Call*>(self);
      call.schedule->serve(*call.work);
    }
    static void* start(void* self) {
      enter(self);
      return nullptr;
    }
  };

  template <class Work>
  void serve(Work& work) {
    const int worker = __atomic_fetch_add(&workers_, 1, __ATOMIC_RELAXED);
    for (;;) {
      const int number = __atomic_fetch_add(&next_, 1, __ATOMIC_RELAXED);
      if (number >= int(tasks_.size())) return;
      const Task& task = tasks_[number];
      for (int group : {task.wait, task.wait_too})
        while (group >= 0 && __atomic_load_n(&left_[group], __ATOMIC_ACQUIRE) > 0) sched_yield();
      work(task, worker);
      end_streams();
      if (task.signal >= 0) __atomic_sub_fetch(&left_[task.signal], 1, __ATOMIC_RELEASE);
    }
  }

  std::vector<Task> tasks_;
  std::vector<int> left_;
  int next_ = 0, workers_ = 0;
};

// The whole pages within it, which read as zeros from here on.
inline void give_back(void* memory, size_t bytes) {
#if defined(__linux__)
  const uintptr_t page = sysconf(_SC_PAGESIZE), begin = (uintptr_t(memory) + page - 1) / page * page;
  const uintptr_t end = (uintptr_t(memory) + bytes) / page * page;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
#endif
}

// One piece of memory for everything a call needs, kept for the next: fresh memory costs more than the work in it. What
// is beyond KEPT_BYTES goes back to the system after the call: one that needs more computes long enough to pay for it.
class Workspace {
 public:
  static constexpr size_t KEPT_BYTES = size_t(128) << 20;

  explicit Workspace(size_t floats) : bytes_(floats * sizeof(float)) {
    kept_ = pthread_mutex_trylock(&busy()) == 0;
    if (!kept_) {
      memory_ = allocate(bytes_);
      return;
    }
    if (room() < bytes_) {
      std::free(memory());
      memory() = nullptr;
      room() = 0;
      try {
        memory() = allocate(bytes_);
      } catch (...) {
        pthread_mutex_unlock(&busy());
        throw;
      }
      room() = bytes_;
    }
    memory_ = memory();
  }
  ~Workspace() {
    if (kept_) {
      if (bytes_ > KEPT_BYTES) give_back(memory_ + KEPT_BYTES, bytes_ - KEPT_BYTES);
      pthread_mutex_unlock(&busy());
    } else {
      std::free(memory_);
    }
  }
  Workspace(const Workspace&) = delete;

  float* take(size_t floats) {
    float* piece = reinterpret_cast<float*>(memory_) + taken_;
    taken_ += padded(floats);
    return piece;
  }
  static size_t padded(size_t floats) { return (floats + 63) / 64 * 64; }

  // Every value that is left from earlier calls becomes NaN.
  static void poison() {
    pthread_mutex_lock(&busy());
    if (memory()) std::memset(memory(), 0xFF, room());
    pthread_mutex_unlock(&busy());
  }

 private:
  static char* allocate(size_t bytes) {
    const size_t page = size_t(2) << 20;
    void* memory = nullptr;
    if (posix_memalign(&memory, page, (bytes + page - 1) / page * page)) throw std::bad_alloc();
#if defined(__linux__)
    madvise(memory, (bytes + page - 1) / page * page, MADV_HUGEPAGE);
#endif
    return static_cast<char*>(memory);
  }
  static pthread_mutex_t& busy() {
    static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    return mutex;
  }
  static char*& memory() {
    static char* kept = nullptr;
    return kept;
  }
  static size_t& room() {
    static size_t bytes = 0;
    return bytes;
  }

  char* memory_ = nullptr;
  size_t bytes_, taken_ = 0;
  bool kept_;
};

}  // namespace turnout
