// Chooses the kernels for this machine; notices forks.
#include <pthread.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <string>

#include "cpu/common.h"

namespace draco {

#ifdef DRACO_HAVE_BASELINE
namespace baseline {
extern const Kernels kTable;
}
#endif
#ifdef DRACO_HAVE_NEON
namespace neon {
extern const Kernels kTable;
}
#endif
#ifdef DRACO_HAVE_AVX2
namespace avx2 {
extern const Kernels kTable;
}
#endif
#ifdef DRACO_HAVE_AVX512
namespace avx512 {
extern const Kernels kTable;
}
#endif

namespace {

[[maybe_unused]] const int watches_forks = pthread_atfork(nullptr, nullptr, [] { is_forked_child = true; });

#if defined(__x86_64__)
// Conversions of float16. Not every compiler's __builtin_cpu_supports knows them; that the system saves the registers
// follows from AVX2.
[[maybe_unused]] bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

const Kernels& choose() {
  std::vector<const Kernels*> usable;
#ifdef DRACO_HAVE_BASELINE
  usable.push_back(&baseline::kTable);
#endif
#ifdef DRACO_HAVE_NEON
  usable.push_back(&neon::kTable);
#endif
#ifdef DRACO_HAVE_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) usable.push_back(&avx2::kTable);
#endif
#ifdef DRACO_HAVE_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma") && has_f16c())
    usable.push_back(&avx512::kTable);
#endif
  const char* wish = std::getenv("DRACO_ISA");
  if (wish == nullptr || *wish == '\0') return *usable.back();
  std::string names;
  for (const Kernels* set : usable) {
    if (std::string(wish) == set->name) return *set;
    names += std::string(names.empty() ? "" : ", ") + set->name;
  }
  STD_TORCH_CHECK(false, "DRACO_ISA=", wish, " cannot be used here; this build on this machine has: ", names);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace draco
