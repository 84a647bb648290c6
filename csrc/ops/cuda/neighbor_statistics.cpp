// neighbor_statistics: torch's stable ABI on one side, the CUDA kernel on the other.
#include "../../cuda/neighbor_statistics.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "stream.h"

namespace mts_fast {
namespace {

using torch::stable::Tensor;

template <typename scalar_t>
void run(const Tensor& tile, const Tensor& row_sample, const Tensor& row_class,
         const Tensor& column_sample, const Tensor& column_offset, int64_t first_column,
         Tensor& similarity, Tensor& index, Tensor& real, Tensor& synthetic) {
  const cuda::MergeParams<scalar_t> params{
      static_cast<const scalar_t*>(tile.data_ptr()),
      static_cast<const int64_t*>(row_sample.data_ptr()),
      static_cast<const int64_t*>(column_sample.data_ptr()),
      static_cast<const int64_t*>(row_class.data_ptr()),
      static_cast<const int64_t*>(column_offset.data_ptr()),
      {static_cast<scalar_t*>(similarity.data_ptr()), static_cast<int64_t*>(index.data_ptr()),
       static_cast<scalar_t*>(real.data_ptr()), static_cast<scalar_t*>(synthetic.data_ptr()),
       similarity.size(1), real.size(1)},
      tile.size(0),
      tile.size(1),
      first_column};
  const OnDeviceOf device(tile);
  check_launch("neighbor_statistics", cuda::merge_rows(params, device.stream));
}

void merge_neighbors_(const Tensor& tile, const Tensor& row_sample, const Tensor& row_class,
                      const Tensor& column_sample, const Tensor& column_offset,
                      int64_t first_column, Tensor similarity, Tensor index, Tensor real,
                      Tensor synthetic) {
  // the Python op passes contiguous tensors, as it has made them.
  if (tile.scalar_type() == torch::headeronly::ScalarType::Double) {
    run<double>(tile, row_sample, row_class, column_sample, column_offset, first_column, similarity,
                index, real, synthetic);
  } else {
    run<float>(tile, row_sample, row_class, column_sample, column_offset, first_column, similarity,
               index, real, synthetic);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mts_fast, CUDA, m) {
  m.impl("merge_neighbors_", TORCH_BOX(&merge_neighbors_));
}

}  // namespace mts_fast
