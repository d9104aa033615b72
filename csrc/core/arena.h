// Scratch, cut into arrays.
#pragma once

#include <cassert>

#include "core/common.h"

namespace draco {
namespace {

// Hands out arrays of the memory that it is given, each on a multiple of 16 bytes. Without memory it only counts: the
// same calls then tell how much they need, so that the two can never disagree. Builds with assertions check every array
// against the end of the memory.
class Arena {
 public:
  DRACO_MEMBER Arena() {}
  DRACO_MEMBER Arena(unsigned char* memory, int64_t bytes) : memory_(memory), bytes_(bytes) {}

  template <typename T>
  DRACO_MEMBER T* take(int64_t count) {
    assert(count >= 0);
    T* taken = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + used_);
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
    if (used_ > needed_) needed_ = used_;
    assert(memory_ == nullptr || used_ <= bytes_);
    return taken;
  }

  // Gives back what was taken since used() was `mark`: the next arrays lie over those.
  DRACO_MEMBER void rewind(int64_t mark) {
    assert(mark <= used_);
    used_ = mark;
  }
  DRACO_MEMBER int64_t used() const { return used_; }
  // The most bytes that were taken at any one time.
  DRACO_MEMBER int64_t needed() const { return needed_; }

 private:
  unsigned char* memory_ = nullptr;
  int64_t bytes_ = 0, used_ = 0, needed_ = 0;
};

}  // namespace
}  // namespace draco
