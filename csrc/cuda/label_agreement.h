// label_agreement on a GPU: how many of a sample's nearest neighbours carry its label.
#pragma once

#include <cuda_runtime.h>

#include "../common/label_agreement.h"

namespace mts_fast::cuda {

// As on the CPU, but a neighbour outside the pool makes both results of its row NaN.
template <typename scalar_t>
cudaError_t label_agreement(const LabelAgreementParams<scalar_t>& params, cudaStream_t stream);

}  // namespace mts_fast::cuda
