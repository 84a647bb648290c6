// label_agreement on the CPU: how many of a sample's nearest neighbours carry its label.
#pragma once

#include <cstdint>

namespace mts_fast::cpu {

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

// Fills rows [begin, end). Returns the first row that names a neighbour outside the pool, or -1.
template <typename scalar_t>
int64_t label_agreement_rows(const LabelAgreementParams<scalar_t>& params, int64_t begin,
                             int64_t end);

}  // namespace mts_fast::cpu
