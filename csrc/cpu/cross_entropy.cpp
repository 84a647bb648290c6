// cross_entropy on the CPU. Bytes moved per logit, forward and backward: 4 + 4 read, 4 written;
// log-softmax and its backward move 28.
#include "cross_entropy.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "targets.h"

namespace mts_fast::cpu {
namespace {

// partial results of a reduction, one per lane: they fill vector registers and hide its latency.
constexpr int64_t kLanes = 32;
// terms that the lanes sum in float before they are added up in double.
constexpr int64_t kBlock = 64 * kLanes;
// below, exp(x) is no longer a normal float, and 0 stands for it.
constexpr float kSmallest = -87.0f;

// exp(x) for x <= 0, relative error 2e-7. NaN stays NaN. Without branches, calls and conversions,
// so that it runs in vector registers:
//   k = round(x / ln 2), r = x - k ln 2 in [-ln 2 / 2, ln 2 / 2]
//   exp(x) = 2^k (1 + r + r^2 p(r)), with Cephes' coefficients of p
MTS_FAST_INLINE float exp_of_negative(float x) {
  constexpr float kLog2E = 1.44269504f;
  constexpr float kLn2High = 0.693359375f;
  constexpr float kLn2Low = -2.12194440e-4f;
  // adding 1.5 * 2^23 rounds to an integer, and leaves it in the low bits.
  constexpr float kRound = 12582912.0f;
  // 1. k and r; ln 2 in two parts, so that r does not lose digits
  const float bounded = x < kSmallest ? kSmallest : x;
  const float shifted = bounded * kLog2E + kRound;
  const float k = shifted - kRound;
  const float r = (bounded - k * kLn2High) - k * kLn2Low;
  // 2. the polynomial, by Horner's rule
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float mantissa = p * (r * r) + r + 1.0f;
  // 3. times 2^k, built from its exponent bits
  const uint32_t power = (std::bit_cast<uint32_t>(shifted) + 127u) << 23;
  const float result = mantissa * std::bit_cast<float>(power);
  return x < kSmallest ? 0.0f : result;
}

MTS_FAST_INLINE float maximum_of(const float* __restrict__ x, int64_t count) {
  // 1. the maximum of each lane
  float lanes[kLanes];
  for (int64_t l = 0; l < kLanes; ++l) lanes[l] = x[0];
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] = x[j + l] > lanes[l] ? x[j + l] : lanes[l];
  }
  // 2. over the lanes, and the entries after the last full group of lanes
  float maximum = lanes[0];
  for (int64_t l = 1; l < kLanes; ++l) maximum = std::max(maximum, lanes[l]);
  for (; j < count; ++j) maximum = std::max(maximum, x[j]);
  return maximum;
}

// sum_j exp(x_j - maximum): in float by lanes within a block, in double over lanes and blocks.
MTS_FAST_INLINE double sum_of_exp(const float* __restrict__ x, float maximum, int64_t count) {
  double total = 0.0;
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t last = std::min(first + kBlock, count);
    float lanes[kLanes] = {};
    int64_t j = first;
    for (; j + kLanes <= last; j += kLanes) {
      for (int64_t l = 0; l < kLanes; ++l) lanes[l] += exp_of_negative(x[j + l] - maximum);
    }
    for (; j < last; ++j) total += static_cast<double>(exp_of_negative(x[j] - maximum));
    for (int64_t l = 0; l < kLanes; ++l) total += static_cast<double>(lanes[l]);
  }
  return total;
}

MTS_FAST_INLINE void rows(const CrossEntropyParams& params, float* loss, float* maximum,
                          float* log_sum, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t label = params.label[i];
    // 1. ignored rows
    if (label == params.ignored) {
      loss[i] = maximum[i] = log_sum[i] = 0.0f;
      continue;
    }
    const float* x = params.logit + i * params.classes;
    // 2. log-sum-exp, in two passes over the row, which stays in cache
    maximum[i] = maximum_of(x, params.classes);
    log_sum[i] = static_cast<float>(std::log(sum_of_exp(x, maximum[i], params.classes)));
    // 3. the loss
    loss[i] = log_sum[i] - (x[label] - maximum[i]);
  }
}

MTS_FAST_INLINE void backward_rows(const CrossEntropyParams& params, const float* maximum,
                                   const float* log_sum, const float* grad, float* out,
                                   int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    float* __restrict__ d = out + i * params.classes;
    const int64_t label = params.label[i];
    // 1. ignored rows
    if (label == params.ignored) {
      std::fill(d, d + params.classes, 0.0f);
      continue;
    }
    const float* __restrict__ x = params.logit + i * params.classes;
    // 2. grad * softmax
    for (int64_t c = 0; c < params.classes; ++c) {
      d[c] = grad[i] * exp_of_negative((x[c] - maximum[i]) - log_sum[i]);
    }
    // 3. minus grad at the label
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
