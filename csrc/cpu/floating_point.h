// The floating-point mode that kernels need, whatever the caller or its threads have set (torch.set_flush_denormal):
// denormal numbers are kept, and results rounded to nearest.
#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace draco {

// Sets the mode of this thread for as long as it lives.
class FloatingPointMode {
 public:
  FloatingPointMode() : before_(get()) {
    if (((before_ ^ kDefault) & kMask) != 0) set((before_ & ~kMask) | kDefault);
  }
  ~FloatingPointMode() {
    if (((before_ ^ kDefault) & kMask) != 0) set(before_);
  }
  FloatingPointMode(const FloatingPointMode&) = delete;
  FloatingPointMode& operator=(const FloatingPointMode&) = delete;

 private:
#if defined(__SSE2__)
  using Register = uint32_t;
  // Flush to zero, rounding, denormals are zero; exceptions are masked.
  static constexpr Register kMask = 0xffc0, kDefault = 0x1f80;
  static Register get() { return _mm_getcsr(); }
  static void set(Register mode) { _mm_setcsr(mode); }
#elif defined(__aarch64__)
  using Register = uint64_t;
  // Default NaN, flush to zero, rounding, flush float16 to zero.
  static constexpr Register kMask = Register{0x3f} << 21 | Register{1} << 19, kDefault = 0;
  static Register get() {
    Register mode;
    asm volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
  }
  static void set(Register mode) { asm volatile("msr fpcr, %0" : : "r"(mode)); }
#else
  using Register = uint32_t;
  static constexpr Register kMask = 0, kDefault = 0;
  static Register get() { return 0; }
  static void set(Register) {}
#endif

  Register before_;
};

}  // namespace draco
