// label_agreement: torch's stable ABI on one side, the CUDA kernel on the other.
#include "../../cuda/label_agreement.h"

#include <tuple>

#include "../label_agreement.h"
#include "stream.h"

namespace mts_fast {
namespace {

std::tuple<Tensor, Tensor> label_agreement(const Tensor& similarity, const Tensor& neighbor,
                                           const Tensor& label, double epsilon) {
  return label_agreement_by(similarity, neighbor, label, epsilon, [&](const auto& params) {
    const OnDeviceOf device(similarity);
    check_launch("label_agreement", cuda::label_agreement(params, device.stream));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mts_fast, CUDA, m) {
  m.impl("label_agreement", TORCH_BOX(&label_agreement));
}

}  // namespace mts_fast
