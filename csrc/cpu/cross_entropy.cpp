// cross_entropy on the CPU. Bytes of a logit, forward and backward: 4 + 4 read, 4 written; by
// log-softmax and its backward 28.
#include "cross_entropy.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "targets.h"

namespace mts_fast::cpu {
namespace {

// results side by side, for the registers and the latency of the reductions.
constexpr int64_t kSide = 32;
// terms per sum before it is added up in double.
constexpr int64_t kBlock = 64 * kSide;
// below, exp leaves the normal floats and is taken as 0.
constexpr float kSmallest = -87.0f;

// exp(x) for x <= 0, 2e-7 relative: 2^k times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes'
// coefficients). NaN stays NaN. No branch, no call, no conversion: it runs in vector registers.
MTS_FAST_INLINE float exp_of_negative(float x) {
  constexpr float kLog2E = 1.44269504f;
  constexpr float kLn2High = 0.693359375f;
  constexpr float kLn2Low = -2.12194440e-4f;
  // adding 1.5 * 2^23 rounds to an integer, which is then in the low bits.
  constexpr float kRound = 12582912.0f;
  const float bounded = x < kSmallest ? kSmallest : x;
  const float shifted = bounded * kLog2E + kRound;
  const float k = shifted - kRound;
  const float r = (bounded - k * kLn2High) - k * kLn2Low;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float mantissa = p * (r * r) + r + 1.0f;
  const uint32_t power = (std::bit_cast<uint32_t>(shifted) + 127u) << 23;
  const float found = mantissa * std::bit_cast<float>(power);
  return x < kSmallest ? 0.0f : found;
}

MTS_FAST_INLINE float maximum_of(const float* __restrict__ x, int64_t count) {
  float side[kSide];
  for (int64_t l = 0; l < kSide; ++l) side[l] = x[0];
  int64_t j = 0;
  for (; j + kSide <= count; j += kSide) {
    for (int64_t l = 0; l < kSide; ++l) side[l] = x[j + l] > side[l] ? x[j + l] : side[l];
  }
  float found = side[0];
  for (int64_t l = 1; l < kSide; ++l) found = std::max(found, side[l]);
  for (; j < count; ++j) found = std::max(found, x[j]);
  return found;
}

MTS_FAST_INLINE double sum_of_exp(const float* __restrict__ x, float maximum, int64_t count) {
  double total = 0.0;
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t last = std::min(first + kBlock, count);
    float side[kSide] = {};
    int64_t j = first;
    for (; j + kSide <= last; j += kSide) {
      for (int64_t l = 0; l < kSide; ++l) side[l] += exp_of_negative(x[j + l] - maximum);
    }
    for (; j < last; ++j) total += static_cast<double>(exp_of_negative(x[j] - maximum));
    for (int64_t l = 0; l < kSide; ++l) total += static_cast<double>(side[l]);
  }
  return total;
}

MTS_FAST_INLINE void rows(const CrossEntropyParams& params, float* loss, float* maximum,
                          float* log_sum, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t label = params.label[i];
    if (label == params.ignored) {
      loss[i] = maximum[i] = log_sum[i] = 0.0f;
      continue;
    }
    const float* x = params.logit + i * params.classes;
    maximum[i] = maximum_of(x, params.classes);
    log_sum[i] = static_cast<float>(std::log(sum_of_exp(x, maximum[i], params.classes)));
    loss[i] = log_sum[i] - (x[label] - maximum[i]);
  }
}

MTS_FAST_INLINE void backward_rows(const CrossEntropyParams& params, const float* maximum,
                                   const float* log_sum, const float* grad, float* out,
                                   int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    float* __restrict__ d = out + i * params.classes;
    const int64_t label = params.label[i];
    if (label == params.ignored) {
      std::fill(d, d + params.classes, 0.0f);
      continue;
    }
    const float* __restrict__ x = params.logit + i * params.classes;
    for (int64_t c = 0; c < params.classes; ++c) {
      d[c] = grad[i] * exp_of_negative((x[c] - maximum[i]) - log_sum[i]);
    }
    d[label] -= grad[i];
  }
}

}  // namespace

MTS_FAST_FOR_EVERY_ISA(known_rows, rows,
                       (const CrossEntropyParams& params, float* loss, float* maximum,
                        float* log_sum, int64_t begin, int64_t end),
                       (params, loss, maximum, log_sum, begin, end))
MTS_FAST_FOR_EVERY_ISA(cross_entropy_backward_rows, backward_rows,
                       (const CrossEntropyParams& params, const float* maximum,
                        const float* log_sum, const float* grad, float* out, int64_t begin,
                        int64_t end),
                       (params, maximum, log_sum, grad, out, begin, end))

int64_t cross_entropy_rows(const CrossEntropyParams& params, float* loss, float* maximum,
                           float* log_sum, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t label = params.label[i];
    if (label != params.ignored && (label < 0 || label >= params.classes)) return i;
  }
  known_rows(params, loss, maximum, log_sum, begin, end);
  return -1;
}

}  // namespace mts_fast::cpu
