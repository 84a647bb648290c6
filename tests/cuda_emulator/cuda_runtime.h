// Runs the kernels of csrc/cuda on a CPU, so that their logic is tested where there is no GPU: it
// takes the place of CUDA's header of the same name when g++ compiles a .cu file.
//
// Every CUDA thread is a fiber. Warps run one after another, in an order that a seed shuffles;
// lanes switch where they exchange values. A lane that misses an exchange is an error, not a hang.
// Timing, memory visibility between lanes without an exchange, and alignment are not emulated.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

namespace emulator {

constexpr int kLanes = 32;
constexpr std::size_t kStackBytes = 64 * 1024;

struct Index {
  unsigned x = 0;
};

inline Index thread;
inline Index block;
inline Index block_size;
inline unsigned seed = 0;

// One warp: 32 fibers that meet to exchange 64-bit values.
class Warp {
 public:
  void run(const std::function<void()>& kernel, unsigned first_thread) {
    kernel_ = &kernel;
    for (int lane = 0; lane < kLanes; ++lane) {
      Fiber& fiber = fibers_[lane];
      fiber.stack.resize(kStackBytes);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = kStackBytes;
      fiber.context.uc_link = &scheduler_;
      fiber.done = fiber.waits = false;
      makecontext(&fiber.context, &Warp::enter, 0);
    }
    current = this;
    for (bool left = true; left;) {
      left = false;
      for (lane_ = 0; lane_ < kLanes; ++lane_) {
        if (fibers_[lane_].done) continue;
        thread.x = first_thread + lane_;
        swapcontext(&scheduler_, &fibers_[lane_].context);
        left = left || !fibers_[lane_].done;
      }
      meet();
    }
  }

  // Deposits this lane's value, waits for all lanes, returns the values of all lanes.
  const std::array<uint64_t, kLanes>& exchange(uint64_t value) {
    Fiber& me = fibers_[lane_];
    slots_[lane_] = value;
    me.waits = true;
    swapcontext(&me.context, &scheduler_);
    return met_;
  }

  static inline Warp* current = nullptr;

 private:
  struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    bool done = false;
    bool waits = false;
  };

  static void enter() {
    (*current->kernel_)();
    current->fibers_[current->lane_].done = true;
  }

  // After a round every lane either waits or has returned; both at once is divergence.
  void meet() {
    int waiting = 0;
    for (Fiber& fiber : fibers_) waiting += !fiber.done && fiber.waits;
    if (waiting != 0 && waiting != kLanes) {
      std::fprintf(stderr, "cuda emulator: %d of 32 lanes wait for the others\n", waiting);
      std::abort();
    }
    for (Fiber& fiber : fibers_) fiber.waits = false;
    met_ = slots_;
  }

  std::array<Fiber, kLanes> fibers_;
  std::array<uint64_t, kLanes> slots_{};
  std::array<uint64_t, kLanes> met_{};
  ucontext_t scheduler_;
  const std::function<void()>* kernel_ = nullptr;
  int lane_ = 0;
};

template <typename Kernel, typename... Args>
void launch(Kernel kernel, unsigned blocks, unsigned threads, Args... args) {
  const unsigned warps = threads / kLanes;
  std::vector<unsigned> order(blocks * warps);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), std::mt19937(seed));
  const std::function<void()> body = [&] { kernel(args...); };
  const auto warp = std::make_unique<Warp>();
  block_size.x = threads;
  for (const unsigned index : order) {
    block.x = index / warps;
    warp->run(body, index % warps * kLanes);
  }
}

template <typename T>
uint64_t to_bits(T value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <typename T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulator

#define threadIdx (emulator::thread)
#define blockIdx (emulator::block)
#define blockDim (emulator::block_size)
#define MTS_FAST_LAUNCH(kernel, blocks, threads, stream, ...) \
  emulator::launch(kernel, blocks, threads, __VA_ARGS__)

inline unsigned __ballot_sync(unsigned, bool vote) {
  const auto& votes = emulator::Warp::current->exchange(vote);
  unsigned ballot = 0;
  for (int lane = 0; lane < emulator::kLanes; ++lane) ballot |= unsigned(votes[lane]) << lane;
  return ballot;
}

template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  return emulator::from_bits<T>(
      emulator::Warp::current->exchange(emulator::to_bits(value))[source]);
}

inline int __ffs(int value) { return __builtin_ffs(value); }
