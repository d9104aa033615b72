#include "tests/simt.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <vector>

namespace simt {

dim3 thread, block, block_size, grid_size;

namespace {

constexpr size_t kStack = 128 * 1024;
constexpr int kWarp = 32;

enum class Waits { kNo, kBlock, kWarp, kDone };

#if defined(__x86_64__)

// A stack of its own and where it stopped. swapcontext does the same and asks the kernel for the signal mask each time,
// which would make the tests ten times slower.
struct Context {
  void* stack_pointer = nullptr;
};

asm(R"(
.text
simt_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov (%rsi), %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");
extern "C" void simt_switch(Context* from, const Context* to);

void switch_to(Context& from, const Context& to) { simt_switch(&from, &to); }

void prepare(Context& context, unsigned char* stack, size_t size, void (*entry)()) {
  constexpr int kSaved = 6;
  auto* top = reinterpret_cast<uint64_t*>((reinterpret_cast<uintptr_t>(stack) + size) / 16 * 16);
  *--top = 0;  // as if entry had been called: its frame starts 8 bytes below a multiple of 16
  *--top = reinterpret_cast<uint64_t>(entry);
  for (int i = 0; i < kSaved; ++i) *--top = 0;
  context.stack_pointer = top;
}

#else

using Context = ucontext_t;

void switch_to(Context& from, const Context& to) { swapcontext(&from, &to); }

void prepare(Context& context, unsigned char* stack, size_t size, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = size;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}

#endif

struct Fiber {
  Context context;
  Waits waits = Waits::kNo;
  int line = 0;          // where it waits
  uint64_t value = 0;    // what it brought
  size_t allocated = 0;  // pieces of shared memory it has asked for
};

struct Piece {
  std::unique_ptr<unsigned char[]> bytes;
  int64_t size;
};

std::mutex one_launch_at_a_time;
Context scheduler;
std::vector<Fiber> fibers;
// Of the largest launch so far: fresh ones cost more than most kernels.
std::vector<std::unique_ptr<unsigned char[]>> stacks;
Fiber* running = nullptr;
const std::function<void()>* kernel = nullptr;
std::vector<Piece> pieces;  // of the block's shared memory
Piece dynamic_piece;
bool block_result = false;
std::vector<uint64_t> warp_result;

[[noreturn]] void stop(const std::string& what) {
  std::fprintf(stderr, "simt: %s\n", what.c_str());
  std::abort();
}

std::string where(const Fiber& fiber) {
  const std::string name = "thread " + std::to_string(&fiber - fibers.data());
  switch (fiber.waits) {
    case Waits::kBlock:
      return name + " waits for the block at line " + std::to_string(fiber.line);
    case Waits::kWarp:
      return name + " waits for its warp at line " + std::to_string(fiber.line);
    default:
      return name + " has ended";
  }
}

Piece poisoned(int64_t size) {
  Piece piece{std::unique_ptr<unsigned char[]>(new unsigned char[size]), size};
  std::fill_n(piece.bytes.get(), size, static_cast<unsigned char>(0xff));
  return piece;
}

void run_fiber() {
  (*kernel)();
  running->waits = Waits::kDone;
  switch_to(running->context, scheduler);
}

void wait(Waits what, int line, uint64_t value) {
  Fiber& self = *running;
  self.waits = what;
  self.line = line;
  self.value = value;
  switch_to(self.context, scheduler);
}

// Lets a group of fibers go on once all of them wait for the same thing at the same place.
bool release(size_t first, size_t count, Waits what) {
  for (size_t i = first; i < first + count; ++i) {
    const Fiber& fiber = fibers[i];
    if (fiber.waits == what && fiber.line == fibers[first].line && fibers[first].waits == what) continue;
    return false;
  }
  for (size_t i = first; i < first + count; ++i) fibers[i].waits = Waits::kNo;
  return true;
}

class Order {
 public:
  Order() {
    const char* wish = std::getenv("DRACO_SIMT_ORDER");
    name_ = wish == nullptr ? "forward" : wish;
    if (name_ != "forward" && name_ != "reverse") random_.seed(static_cast<unsigned>(std::stoul(name_)));
  }
  void arrange(std::vector<int64_t>& indices) {
    std::iota(indices.begin(), indices.end(), int64_t{0});
    if (name_ == "reverse") {
      std::reverse(indices.begin(), indices.end());
    } else if (name_ != "forward") {
      std::shuffle(indices.begin(), indices.end(), random_);
    }
  }

 private:
  std::string name_;
  std::mt19937 random_;
};

void run_block(int64_t index, Order& order, std::vector<int64_t>& turns) {
  block = {static_cast<unsigned>(index), 0, 0};
  pieces.clear();
  const size_t count = fibers.size();
  for (size_t i = 0; i < count; ++i) {
    fibers[i].waits = Waits::kNo;
    fibers[i].allocated = 0;
    prepare(fibers[i].context, stacks[i].get(), kStack, run_fiber);
  }
  for (;;) {
    order.arrange(turns);
    for (const int64_t turn : turns) {
      running = &fibers[turn];
      if (running->waits != Waits::kNo) continue;
      thread = {static_cast<unsigned>(turn), 0, 0};
      switch_to(scheduler, running->context);
    }
    bool progress = false;
    for (size_t warp = 0; warp < count; warp += kWarp) {
      if (!release(warp, std::min<size_t>(kWarp, count - warp), Waits::kWarp)) continue;
      for (size_t i = warp; i < std::min(warp + kWarp, count); ++i) warp_result[i] = fibers[i].value;
      progress = true;
    }
    if (progress) continue;
    if (release(0, count, Waits::kBlock)) {
      block_result = std::any_of(fibers.begin(), fibers.end(), [](const Fiber& fiber) { return fiber.value != 0; });
      continue;
    }
    if (std::all_of(fibers.begin(), fibers.end(), [](const Fiber& fiber) { return fiber.waits == Waits::kDone; }))
      return;
    for (const Fiber& fiber : fibers) {
      if (fiber.waits != fibers[0].waits || fiber.line != fibers[0].line)
        stop("block " + std::to_string(index) + " diverges: " + where(fibers[0]) + ", " + where(fiber));
    }
    stop("block " + std::to_string(index) + " cannot go on: " + where(fibers[0]));
  }
}

}  // namespace

void launch(int64_t blocks, int threads, int64_t shared_bytes, const std::function<void()>& body) {
  if (blocks < 1 || blocks > 0x7fffffff || threads < 1 || threads > 1024 || shared_bytes > 48 * 1024)
    stop("a launch that a device would refuse: " + std::to_string(blocks) + " blocks of " + std::to_string(threads) +
         " threads with " + std::to_string(shared_bytes) + " bytes of shared memory");
  const std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  Order order;
  kernel = &body;
  fibers.resize(threads);
  while (stacks.size() < fibers.size()) stacks.emplace_back(new unsigned char[kStack]);
  warp_result.assign(threads + kWarp, 0);
  grid_size = {static_cast<unsigned>(blocks), 1, 1};
  block_size = {static_cast<unsigned>(threads), 1, 1};
  std::vector<int64_t> sequence(blocks), turns(threads);
  order.arrange(sequence);
  for (const int64_t index : sequence) {
    dynamic_piece = poisoned(shared_bytes);
    run_block(index, order, turns);
  }
}

void* allocate_shared(int64_t bytes) {
  const size_t index = running->allocated++;
  if (index == pieces.size()) pieces.push_back(poisoned(bytes));
  if (pieces[index].size != bytes) stop("threads of a block ask for different shared memory");
  return pieces[index].bytes.get();
}

unsigned char* dynamic_shared() { return dynamic_piece.bytes.get(); }

bool block_barrier(int line, bool value) {
  wait(Waits::kBlock, line, value);
  return block_result;
}

const uint64_t* warp_barrier(int line, uint64_t value) {
  wait(Waits::kWarp, line, value);
  return &warp_result[(running - fibers.data()) / kWarp * kWarp];
}

}  // namespace simt
