// class_centroids: torch's stable ABI on one side, the CUDA kernel on the other.
#include "../../cuda/class_centroids.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "stream.h"

namespace mts_fast {
namespace {

using torch::stable::Tensor;

template <typename scalar_t>
void run(const Tensor& embedding, const Tensor& order, const Tensor& offset, Tensor& sum) {
  const cuda::ClassCentroidsParams<scalar_t> params{
      static_cast<const scalar_t*>(embedding.data_ptr()),
      static_cast<const int64_t*>(order.data_ptr()),
      static_cast<const int64_t*>(offset.data_ptr()),
      static_cast<double*>(sum.data_ptr()),
      offset.size(0) - 1,
      embedding.size(1)};
  const OnDeviceOf device(embedding);
  check_launch("class_centroids", cuda::class_centroids(params, device.stream));
}

void sum_groups_(const Tensor& embedding, const Tensor& order, const Tensor& offset, Tensor sum) {
  const Tensor embedding_c = torch::stable::contiguous(embedding);
  if (embedding_c.scalar_type() == torch::headeronly::ScalarType::Double) {
    run<double>(embedding_c, order, offset, sum);
  } else {
    run<float>(embedding_c, order, offset, sum);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mts_fast, CUDA, m) { m.impl("sum_groups_", TORCH_BOX(&sum_groups_)); }

}  // namespace mts_fast
