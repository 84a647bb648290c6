// percentile_rank: torch's stable ABI on one side, the plain C++ kernel on the other.
#include "../../cpu/percentile_rank.h"

#include <vector>

#include "../tensor.h"

namespace mts_fast {
namespace {

Tensor percentile_rank(const Tensor& value, const Tensor& label, int64_t num_classes) {
  // the Python op has checked shapes, dtypes and ranges, but not strides.
  const Tensor value_c = torch::stable::contiguous(value);
  const Tensor label_c = torch::stable::contiguous(label);
  Tensor rank = torch::stable::new_empty(value_c, {value_c.size(0)});
  with_scalar_type(value_c, [&]<typename scalar_t>() {
    std::vector<cpu::Ranked<scalar_t>> sorted(value_c.size(0));
    std::vector<int64_t> offset(num_classes + 1);
    const cpu::PercentileRankParams<scalar_t> params{data<const scalar_t>(value_c),
                                                     data<const int64_t>(label_c),
                                                     sorted.data(),
                                                     offset.data(),
                                                     data<scalar_t>(rank),
                                                     value_c.size(0),
                                                     num_classes};
    cpu::group_by_class(params);
    torch::stable::parallel_for(0, num_classes, 1, [&](int64_t begin, int64_t end) {
      cpu::percentile_rank_classes(params, begin, end);
    });
  });
  return rank;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mts_fast, CPU, m) {
  m.impl("percentile_rank", TORCH_BOX(&percentile_rank));
}

}  // namespace mts_fast
