// Blocks of an expert that several threads compute add to one sum of its gradients, product by product, each block after
// the one before it: no thread needs a copy of them, and the sums are the same whatever the threads.
#pragma once

#include <sched.h>

#include <vector>

#include "row_sums.h"

namespace turnout {

// Each unit does the same steps in the same order. The unit before it stands before it in the schedule, so that some
// thread has it: nobody waits for what nobody computes.
class Relay {
 public:
  explicit Relay(const std::vector<Unit>& units) : units_(units), passed_(units.size(), 0) {}

  // Its next step, once the unit of the same expert before it has done that.
  template <class Step>
  void in_turn(int unit, Step step) {
    if (units_[unit].part)
      while (__atomic_load_n(&passed_[unit - 1], __ATOMIC_ACQUIRE) <= passed_[unit]) sched_yield();
    step();
    end_streams();
    __atomic_store_n(&passed_[unit], passed_[unit] + 1, __ATOMIC_RELEASE);
  }

 private:
  const std::vector<Unit>& units_;
  std::vector<int> passed_;  // steps that each unit has done
};

}  // namespace turnout
