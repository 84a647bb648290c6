// percentile_rank: torch's stable ABI on one side, the plain C++ kernel on the other.
#include "../cpu/percentile_rank.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

namespace mts_fast {
namespace {

using torch::stable::Tensor;

template <typename scalar_t>
void run(const Tensor& value, const Tensor& label, int64_t num_classes, Tensor& rank) {
  std::vector<cpu::Ranked<scalar_t>> sorted(value.size(0));
  std::vector<int64_t> offset(num_classes + 1);
  const cpu::PercentileRankParams<scalar_t> params{static_cast<const scalar_t*>(value.data_ptr()),
                                                   static_cast<const int64_t*>(label.data_ptr()),
                                                   sorted.data(),
                                                   offset.data(),
                                                   static_cast<scalar_t*>(rank.data_ptr()),
                                                   value.size(0),
                                                   num_classes};
  cpu::group_by_class(params);
  torch::stable::parallel_for(0, num_classes, 1, [&](int64_t begin, int64_t end) {
    cpu::percentile_rank_classes(params, begin, end);
  });
}

Tensor percentile_rank(const Tensor& value, const Tensor& label, int64_t num_classes) {
  // the Python op has checked shapes, dtypes and ranges; strides are this layer's business.
  const Tensor value_c = torch::stable::contiguous(value);
  const Tensor label_c = torch::stable::contiguous(label);
  Tensor rank = torch::stable::new_empty(value_c, {value_c.size(0)});
  if (value_c.scalar_type() == torch::headeronly::ScalarType::Double) {
    run<double>(value_c, label_c, num_classes, rank);
  } else {
    run<float>(value_c, label_c, num_classes, rank);
  }
  return rank;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mts_fast, CPU, m) {
  m.impl("percentile_rank", TORCH_BOX(&percentile_rank));
}

}  // namespace mts_fast
