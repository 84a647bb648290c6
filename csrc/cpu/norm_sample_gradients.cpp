// Gradients of norms by sample on the CPU. Bytes moved per float32 entry: 8, x and b once; the
// norm, its product with b and two sums move 28. A row or group is read three times, but stays in
// cache.
#include "norm_sample_gradients.h"

#include <algorithm>
#include <cmath>

#include "targets.h"

namespace mts_fast::cpu {
namespace {

// partial sums, one per lane: they fill vector registers and hide the latency of an addition. Of
// short rows, adding up many lanes would take longer than the row.
constexpr int64_t kManyLanes = 32, kFewLanes = 16;
constexpr int64_t kShort = 128;
// terms that a lane sums before the lanes are added up in double.
constexpr int64_t kBlock = 64;
// rows whose terms are added to a column's sum in one pass over the columns.
constexpr int64_t kRows = 4;
// rows summed in scalar_t before they are added up in double.
constexpr int64_t kBlockRows = 64;

struct Moments {
  double mean;
  double rstd;  // 1 / sqrt(variance + eps)
};

// sums[s] = sum_j term(j, s) over [0, count), for kSums sums: by lanes within a block, in double
// over the blocks.
template <typename scalar_t, int64_t kLanes, int64_t kSums, typename Term>
MTS_FAST_INLINE void sum_by_lanes(int64_t count, double* sums, const Term& term) {
  std::fill(sums, sums + kSums, 0.0);
  for (int64_t first = 0; first < count; first += kBlock * kLanes) {
    const int64_t last = std::min(first + kBlock * kLanes, count);
    scalar_t lanes[kSums][kLanes] = {};
    // 1. groups of all lanes, and the entries after the last group
    int64_t j = first;
    for (; j + kLanes <= last; j += kLanes) {
      for (int64_t s = 0; s < kSums; ++s) {
        for (int64_t l = 0; l < kLanes; ++l) lanes[s][l] += term(j + l, s);
      }
    }
    for (; j < last; ++j) {
      for (int64_t s = 0; s < kSums; ++s) lanes[s][0] += term(j, s);
    }
    // 2. over the lanes, in halves
    for (int64_t s = 0; s < kSums; ++s) {
      for (int64_t half = kLanes / 2; half > 0; half /= 2) {
        for (int64_t l = 0; l < half; ++l) lanes[s][l] += lanes[s][l + half];
      }
      sums[s] += static_cast<double>(lanes[s][0]);
    }
  }
}

template <typename scalar_t, int64_t kSums, typename Term>
MTS_FAST_INLINE void sum_up(int64_t count, double* sums, const Term& term) {
  if (count < kShort) return sum_by_lanes<scalar_t, kFewLanes, kSums>(count, sums, term);
  sum_by_lanes<scalar_t, kManyLanes, kSums>(count, sums, term);
}

// Mean and variance in two passes, the mean from the gaps to the first entry, so that a mean far
// from 0 loses no digits; without centering the mean is 0, and the variance that of 0.
template <typename scalar_t>
MTS_FAST_INLINE Moments moments_of(const scalar_t* __restrict__ x, int64_t count, double eps,
                                   bool centered) {
  const double size = static_cast<double>(count);
  double mean = 0.0, squares;
  if (centered) {
    const scalar_t pivot = x[0];
    sum_up<scalar_t, 1>(count, &mean, [&](int64_t j, int64_t) { return x[j] - pivot; });
    mean = mean / size + static_cast<double>(pivot);
  }
  const scalar_t center = static_cast<scalar_t>(mean);
  sum_up<scalar_t, 1>(count, &squares, [&](int64_t j, int64_t) {
    const scalar_t gap = x[j] - center;
    return gap * gap;
  });
  return {mean, 1.0 / std::sqrt(squares / size + eps)};
}

// column sums [2, channels], of x^ b and of b, += the terms of kCount rows from x and b on.
template <typename scalar_t, int64_t kCount>
MTS_FAST_INLINE void add_rows(const LayerNormParams<scalar_t>& params,
                              const scalar_t* __restrict__ x, const scalar_t* __restrict__ b,
                              scalar_t* sums) {
  const int64_t channels = params.channels;
  scalar_t* __restrict__ weight = sums;
  scalar_t* __restrict__ bias = sums + channels;
  // 1. mean and rstd of each row
  scalar_t mean[kCount], rstd[kCount];
  for (int64_t k = 0; k < kCount; ++k) {
    const Moments m = moments_of(x + k * channels, channels, params.eps, params.centered);
    mean[k] = static_cast<scalar_t>(m.mean);
    rstd[k] = static_cast<scalar_t>(m.rstd);
  }
  // 2. one pass over the columns of all
  for (int64_t c = 0; c < channels; ++c) {
    scalar_t product = 0, sum = 0;
    for (int64_t k = 0; k < kCount; ++k) {
      const scalar_t slope = b[k * channels + c];
      product += (x[k * channels + c] - mean[k]) * rstd[k] * slope;
      sum += slope;
    }
    weight[c] += product;
    bias[c] += sum;
  }
}

template <typename scalar_t>
MTS_FAST_INLINE void layer_norm(const LayerNormParams<scalar_t>& params,
                                const LayerNormSums<scalar_t>& sums, int64_t begin, int64_t end) {
  const int64_t channels = params.channels;
  scalar_t* __restrict__ block = sums.block;
  double* __restrict__ total = sums.total;
  for (int64_t i = begin; i < end; ++i) {
    const scalar_t* x = params.x + i * params.positions * channels;
    const scalar_t* b = params.b + i * params.positions * channels;
    std::fill(total, total + 2 * channels, 0.0);
    for (int64_t first = 0; first < params.positions; first += kBlockRows) {
      const int64_t last = std::min(first + kBlockRows, params.positions);
      // 1. the column sums of a block of rows
      std::fill(block, block + 2 * channels, scalar_t(0));
      int64_t t = first;
      for (; t + kRows <= last; t += kRows) {
        add_rows<scalar_t, kRows>(params, x + t * channels, b + t * channels, block);
      }
      for (; t < last; ++t) {
        add_rows<scalar_t, 1>(params, x + t * channels, b + t * channels, block);
      }
      // 2. added to those of the blocks before
      for (int64_t c = 0; c < 2 * channels; ++c) total[c] += static_cast<double>(block[c]);
    }
    // 3. the sample's gradients
    scalar_t* __restrict__ weight = params.weight + i * channels;
    for (int64_t c = 0; c < channels; ++c) weight[c] = static_cast<scalar_t>(total[c]);
    if (params.bias == nullptr) continue;
    scalar_t* __restrict__ bias = params.bias + i * channels;
    for (int64_t c = 0; c < channels; ++c) bias[c] = static_cast<scalar_t>(total[channels + c]);
  }
}

template <typename scalar_t>
MTS_FAST_INLINE void group_norm(const GroupNormParams<scalar_t>& params, int64_t begin,
                                int64_t end) {
  const int64_t positions = params.positions;
  for (int64_t group = begin; group < end; ++group) {
    const int64_t first = group * params.group_channels;  // of all samples' channels
    // 1. mean and rstd of the group, or those that were passed
    Moments m{};
    if (params.mean == nullptr) {
      const scalar_t* x = params.x + first * positions;
      m = moments_of(x, params.group_channels * positions, params.eps, true);
    } else {
      const int64_t channel = group % params.groups;
      m.mean = static_cast<double>(params.mean[channel]);
      m.rstd = 1.0 / std::sqrt(static_cast<double>(params.variance[channel]) + params.eps);
    }
    const scalar_t mean = static_cast<scalar_t>(m.mean);
    const double rounded_off = m.mean - static_cast<double>(mean);
    // 2. the sums of each of its channels
    for (int64_t c = first; c < first + params.group_channels; ++c) {
      const scalar_t* __restrict__ x = params.x + c * positions;
      const scalar_t* __restrict__ b = params.b + c * positions;
      double sums[2];
      sum_up<scalar_t, 2>(positions, sums, [&](int64_t j, int64_t s) {
        return s == 0 ? (x[j] - mean) * b[j] : b[j];
      });
      params.weight[c] = static_cast<scalar_t>(m.rstd * (sums[0] - rounded_off * sums[1]));
      params.bias[c] = static_cast<scalar_t>(sums[1]);
    }
  }
}

}  // namespace

#define MTS_FAST_NORMS(scalar_t)                                                                \
  MTS_FAST_FOR_EVERY_ISA(layer_norm_sample_gradients, layer_norm,                               \
                         (const LayerNormParams<scalar_t>& p, const LayerNormSums<scalar_t>& s, \
                          int64_t b, int64_t e),                                                \
                         (p, s, b, e))                                                          \
  MTS_FAST_FOR_EVERY_ISA(group_norm_sample_gradients, group_norm,                               \
                         (const GroupNormParams<scalar_t>& p, int64_t b, int64_t e), (p, b, e))
MTS_FAST_NORMS(float)
MTS_FAST_NORMS(double)

}  // namespace mts_fast::cpu
