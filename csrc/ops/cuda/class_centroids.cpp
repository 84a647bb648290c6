// class_centroids: torch's stable ABI on one side, the CUDA kernel on the other.
#include "../../cuda/class_centroids.h"

#include "../tensor.h"
#include "stream.h"

namespace mts_fast {
namespace {

void sum_groups_(const Tensor& embedding, const Tensor& order, const Tensor& offset, Tensor sum) {
  const Tensor embedding_c = torch::stable::contiguous(embedding);
  with_scalar_type(embedding_c, [&]<typename scalar_t>() {
    const cuda::ClassCentroidsParams<scalar_t> params{data<const scalar_t>(embedding_c),
                                                      data<const int64_t>(order),
                                                      data<const int64_t>(offset),
                                                      data<double>(sum),
                                                      offset.size(0) - 1,
                                                      embedding_c.size(1)};
    const OnDeviceOf device(embedding_c);
    check_launch("class_centroids", cuda::class_centroids(params, device.stream));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mts_fast, CUDA, m) { m.impl("sum_groups_", TORCH_BOX(&sum_groups_)); }

}  // namespace mts_fast
