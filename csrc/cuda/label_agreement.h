// label_agreement on a GPU: how many of a sample's nearest neighbours carry its label.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace mts_fast::cuda {

template <typename scalar_t>
struct LabelAgreementParams {
  const scalar_t* similarity;  // [num_samples, num_neighbors], contiguous
  const int64_t* neighbor;     // [num_samples, num_neighbors], contiguous, indices into label
  const int64_t* label;        // [num_samples]
  scalar_t* plain;             // [num_samples], out: share of the neighbours with the same label
  scalar_t* weighted;          // [num_samples], out: the same share, weighted by similarity
  int64_t num_samples;
  int64_t num_neighbors;
  double epsilon;  // added to the sum of similarities
};

// A neighbour outside the pool counts as one of another class, and makes both results NaN.
template <typename scalar_t>
cudaError_t label_agreement(const LabelAgreementParams<scalar_t>& params, cudaStream_t stream);

}  // namespace mts_fast::cuda
