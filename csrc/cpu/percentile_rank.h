// percentile_rank on the CPU: ranks among the values of a sample's class.
#pragma once

#include <cstdint>

namespace mts_fast::cpu {

template <typename scalar_t>
struct Ranked {
  scalar_t value;
  int64_t sample;
};

template <typename scalar_t>
struct PercentileRankParams {
  const scalar_t* value;     // [num_samples], no NaN
  const int64_t* label;      // [num_samples], in [0, num_classes)
  Ranked<scalar_t>* sorted;  // [num_samples], work space
  int64_t* offset;           // [num_classes + 1], out: where each class begins in `sorted`
  scalar_t* rank;            // [num_samples], out: in [0, 1]
  int64_t num_samples;
  int64_t num_classes;
};

// Groups the values by class in `sorted`, and fills `offset`.
template <typename scalar_t>
void group_by_class(const PercentileRankParams<scalar_t>& params);

// Sorts classes [begin, end), and writes the ranks of their samples.
template <typename scalar_t>
void percentile_rank_classes(const PercentileRankParams<scalar_t>& params, int64_t begin,
                             int64_t end);

}  // namespace mts_fast::cpu
