// neighbor_statistics: torch's stable ABI on one side, the CUDA kernel on the other.
#include "../../cuda/neighbor_statistics.h"

#include "../tensor.h"
#include "stream.h"

namespace mts_fast {
namespace {

void merge_neighbors_(const Tensor& tile, const Tensor& row_sample, const Tensor& row_class,
                      const Tensor& column_sample, const Tensor& column_offset,
                      int64_t first_column, Tensor similarity, Tensor index, Tensor real,
                      Tensor synthetic) {
  // the Python op has created these tensors, all contiguous.
  with_scalar_type(tile, [&]<typename scalar_t>() {
    const cuda::MergeParams<scalar_t> params{
        data<const scalar_t>(tile),
        data<const int64_t>(row_sample),
        data<const int64_t>(column_sample),
        data<const int64_t>(row_class),
        data<const int64_t>(column_offset),
        {data<scalar_t>(similarity), data<int64_t>(index), data<scalar_t>(real),
         data<scalar_t>(synthetic), similarity.size(1), real.size(1)},
        tile.size(0),
        tile.size(1),
        first_column};
    const OnDeviceOf device(tile);
    check_launch("neighbor_statistics", cuda::merge_rows(params, device.stream));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mts_fast, CUDA, m) {
  m.impl("merge_neighbors_", TORCH_BOX(&merge_neighbors_));
}

}  // namespace mts_fast
