// Kernel launches that compile with nvcc and with the emulator of tests/cuda_emulator.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#ifndef MTS_FAST_LAUNCH
#define MTS_FAST_LAUNCH(kernel, blocks, threads, stream, ...) \
  kernel<<<blocks, threads, 0, stream>>>(__VA_ARGS__)
#endif

namespace mts_fast::cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

inline unsigned ceil_divide(int64_t a, int64_t b) { return static_cast<unsigned>((a + b - 1) / b); }

}  // namespace mts_fast::cuda
