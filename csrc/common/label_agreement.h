// Arguments of label_agreement, on the CPU and on a GPU.
#pragma once

#include <cstdint>

namespace mts_fast {

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

}  // namespace mts_fast
