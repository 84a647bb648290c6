// label_agreement on any device: makes inputs contiguous, allocates outputs, fills the params.
#pragma once

#include <tuple>

#include "../common/label_agreement.h"
#include "tensor.h"

namespace mts_fast {

// `run(params)` writes the outputs. The Python op has checked shapes and dtypes, but not strides.
template <typename Run>
std::tuple<Tensor, Tensor> label_agreement_by(const Tensor& similarity, const Tensor& neighbor,
                                              const Tensor& label, double epsilon, Run&& run) {
  const Tensor similarity_c = torch::stable::contiguous(similarity);
  const Tensor neighbor_c = torch::stable::contiguous(neighbor);
  const Tensor label_c = torch::stable::contiguous(label);
  Tensor plain = torch::stable::new_empty(similarity_c, {similarity_c.size(0)});
  Tensor weighted = torch::stable::new_empty(similarity_c, {similarity_c.size(0)});
  with_scalar_type(similarity_c, [&]<typename scalar_t>() {
    run(LabelAgreementParams<scalar_t>{
        data<const scalar_t>(similarity_c), data<const int64_t>(neighbor_c),
        data<const int64_t>(label_c), data<scalar_t>(plain), data<scalar_t>(weighted),
        similarity_c.size(0), similarity_c.size(1), epsilon});
  });
  return {plain, weighted};
}

}  // namespace mts_fast
