// class_centroids on the CPU: sums of embeddings by class and source.
#pragma once

#include <cstdint>

namespace mts_fast::cpu {

template <typename scalar_t>
struct ClassCentroidsParams {
  const scalar_t* embedding;  // [num_samples, dimension], contiguous
  const int64_t* label;       // [num_samples], in [0, num_classes)
  const bool* is_synthetic;   // [num_samples]
  double* sum;                // [2, num_classes, dimension], added to
  int64_t num_samples;
  int64_t num_classes;
  int64_t dimension;
};

// Adds columns [begin, end) of every sample, in order of index. Threads that divide the columns
// write to different entries, and the sums do not depend on their number.
template <typename scalar_t>
void class_centroids_columns(const ClassCentroidsParams<scalar_t>& params, int64_t begin,
                             int64_t end);

}  // namespace mts_fast::cpu
