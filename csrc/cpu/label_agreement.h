// label_agreement on the CPU: how many of a sample's nearest neighbours carry its label.
#pragma once

#include <cstdint>

#include "../common/label_agreement.h"

namespace mts_fast::cpu {

// Writes rows [begin, end) of plain and weighted. With same_ij = [label of neighbour j = label_i]:
//   plain_i    = sum_j same_ij / K
//   weighted_i = sum_j same_ij similarity_ij / (sum_j similarity_ij + epsilon)
// Returns the first row that names a neighbour outside the pool, or -1.
template <typename scalar_t>
int64_t label_agreement_rows(const LabelAgreementParams<scalar_t>& params, int64_t begin,
                             int64_t end);

}  // namespace mts_fast::cpu
