// label_agreement: torch's stable ABI on one side, the CUDA kernel on the other.
#include "../../cuda/label_agreement.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "stream.h"

namespace mts_fast {
namespace {

using torch::stable::Tensor;

template <typename scalar_t>
void run(const Tensor& similarity, const Tensor& neighbor, const Tensor& label, double epsilon,
         Tensor& plain, Tensor& weighted) {
  const cuda::LabelAgreementParams<scalar_t> params{
      static_cast<const scalar_t*>(similarity.data_ptr()),
      static_cast<const int64_t*>(neighbor.data_ptr()),
      static_cast<const int64_t*>(label.data_ptr()),
      static_cast<scalar_t*>(plain.data_ptr()),
      static_cast<scalar_t*>(weighted.data_ptr()),
      similarity.size(0),
      similarity.size(1),
      epsilon};
  const OnDeviceOf device(similarity);
  check_launch("label_agreement", cuda::label_agreement(params, device.stream));
}

std::tuple<Tensor, Tensor> label_agreement(const Tensor& similarity, const Tensor& neighbor,
                                           const Tensor& label, double epsilon) {
  const Tensor similarity_c = torch::stable::contiguous(similarity);
  const Tensor neighbor_c = torch::stable::contiguous(neighbor);
  const Tensor label_c = torch::stable::contiguous(label);
  Tensor plain = torch::stable::new_empty(similarity_c, {similarity_c.size(0)});
  Tensor weighted = torch::stable::new_empty(similarity_c, {similarity_c.size(0)});
  if (similarity_c.scalar_type() == torch::headeronly::ScalarType::Double) {
    run<double>(similarity_c, neighbor_c, label_c, epsilon, plain, weighted);
  } else {
    run<float>(similarity_c, neighbor_c, label_c, epsilon, plain, weighted);
  }
  return {plain, weighted};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mts_fast, CUDA, m) {
  m.impl("label_agreement", TORCH_BOX(&label_agreement));
}

}  // namespace mts_fast
