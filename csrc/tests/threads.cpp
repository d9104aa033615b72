// torch's parallel_for again, on threads that the thread sanitizer sees start and end: those of libgomp, which is not
// instrumented, wait for each other without its knowledge, and every result would look like a race.
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <thread>
#include <vector>

namespace {
constexpr int64_t kThreads = 4;
}

AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain_size, ParallelFunc f, void* ctx) {
  const int64_t grain = std::max<int64_t>(grain_size, (end - begin + kThreads - 1) / kThreads);
  std::vector<std::thread> threads;
  for (int64_t first = begin; first < end; first += grain)
    threads.emplace_back(f, first, std::min(first + grain, end), ctx);
  for (std::thread& thread : threads) thread.join();
  return 0;
}

AOTITorchError torch_get_num_threads(uint32_t* out_num_threads) {
  *out_num_threads = kThreads;
  return 0;
}
