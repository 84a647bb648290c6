// hypergradient_dot on the CPU: 8 bytes of float32 per product, where a product in place and a sum
// move 16.
#include "hypergradient_dot.h"

#include <algorithm>

#include "targets.h"

namespace mts_fast::cpu {
namespace {

// sums side by side: as many as four registers of AVX-512 hold, to hide the latency of an addition.
constexpr int64_t kSums = 64;
// products per sum before it is added up in double: 32 roundings in float.
constexpr int64_t kDotBlock = 32 * kSums;

template <typename scalar_t>
MTS_FAST_INLINE void dot_rows(const scalar_t* x, const scalar_t* y, scalar_t* out, int64_t length,
                              int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const scalar_t* __restrict__ a = x + i * length;
    const scalar_t* __restrict__ b = y + i * length;
    double total = 0.0;
    for (int64_t first = 0; first < length; first += kDotBlock) {
      const int64_t last = std::min(first + kDotBlock, length);
      scalar_t sum[kSums] = {};
      int64_t j = first;
      for (; j + kSums <= last; j += kSums) {
        for (int64_t l = 0; l < kSums; ++l) sum[l] += a[j + l] * b[j + l];
      }
      for (; j < last; ++j) total += static_cast<double>(a[j]) * static_cast<double>(b[j]);
      for (int64_t l = 0; l < kSums; ++l) total += static_cast<double>(sum[l]);
    }
    out[i] = static_cast<scalar_t>(total);
  }
}

}  // namespace

MTS_FAST_FOR_EVERY_ISA(hypergradient_dot_rows, dot_rows,
                       (const float* x, const float* y, float* out, int64_t length, int64_t begin,
                        int64_t end),
                       (x, y, out, length, begin, end))
MTS_FAST_FOR_EVERY_ISA(hypergradient_dot_rows, dot_rows,
                       (const double* x, const double* y, double* out, int64_t length,
                        int64_t begin, int64_t end),
                       (x, y, out, length, begin, end))

}  // namespace mts_fast::cpu
