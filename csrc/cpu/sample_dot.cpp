// sample_dot on the CPU. Bytes moved per float32 entry: 8; a multiplication in place and a sum move
// 16.
#include "sample_dot.h"

#include <algorithm>

#include "targets.h"

namespace mts_fast::cpu {
namespace {

// running sums side by side: four AVX-512 registers of float, so that additions need not wait for
// one another.
constexpr int64_t kLanes = 64;
// entries whose sums stay in scalar_t: 64 a lane.
constexpr int64_t kRun = 4096;

template <typename scalar_t>
MTS_FAST_INLINE double dot(const scalar_t* __restrict__ x, const scalar_t* __restrict__ y,
                           int64_t count) {
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += kRun) {
    const int64_t end = std::min(begin + kRun, count);
    scalar_t lane[kLanes] = {};
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      for (int64_t j = 0; j < kLanes; ++j) lane[j] += x[i + j] * y[i + j];
    }
    for (int64_t j = 0; i + j < end; ++j) lane[j] += x[i + j] * y[i + j];
    // halves are added up until two lanes are left, which stays in vector registers
    for (int64_t width = kLanes / 2; width > 0; width /= 2) {
      for (int64_t j = 0; j < width; ++j) lane[j] += lane[j + width];
    }
    total += static_cast<double>(lane[0]);
  }
  return total;
}

}  // namespace

#define MTS_FAST_DOT(scalar_t)                                                    \
  MTS_FAST_FOR_EVERY_ISA_RETURNING(double, dot_span, dot,                         \
                                   (const scalar_t* x, const scalar_t* y, int64_t n), (x, y, n))
MTS_FAST_DOT(float)
MTS_FAST_DOT(double)

}  // namespace mts_fast::cpu
