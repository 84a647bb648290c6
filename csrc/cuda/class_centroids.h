// class_centroids on a GPU: sums of embeddings by class and source.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace mts_fast::cuda {

template <typename scalar_t>
struct ClassCentroidsParams {
  const scalar_t* embedding;  // [num_samples, dimension], contiguous
  const int64_t* order;       // [num_samples], samples by (source, class), then by index
  const int64_t* offset;      // [num_groups + 1], where each group begins in `order`
  double* sum;                // [num_groups, dimension], added to
  int64_t num_groups;         // 2 C: the real classes, then the synthetic ones
  int64_t dimension;
};

// Every sum is taken in order of index, without atomics, so that results are the same bit for bit.
template <typename scalar_t>
cudaError_t class_centroids(const ClassCentroidsParams<scalar_t>& params, cudaStream_t stream);

}  // namespace mts_fast::cuda
