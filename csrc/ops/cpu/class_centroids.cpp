// class_centroids: torch's stable ABI on one side, the plain C++ kernel on the other.
#include "../../cpu/class_centroids.h"

#include "../tensor.h"

namespace mts_fast {
namespace {

// columns per task: two cache lines of the sums, so that no two threads write to one cache line.
constexpr int64_t kColumnsPerTask = 16;

void class_centroids_(const Tensor& embedding, const Tensor& label, const Tensor& is_synthetic,
                      Tensor sum, Tensor count) {
  // the Python op has checked shapes, dtypes and ranges, but not strides.
  const Tensor embedding_c = torch::stable::contiguous(embedding);
  const Tensor label_c = torch::stable::contiguous(label);
  const Tensor is_synthetic_c = torch::stable::contiguous(is_synthetic);
  with_scalar_type(embedding_c, [&]<typename scalar_t>() {
    const cpu::ClassCentroidsParams<scalar_t> params{data<const scalar_t>(embedding_c),
                                                     data<const int64_t>(label_c),
                                                     data<const bool>(is_synthetic_c),
                                                     data<double>(sum),
                                                     embedding_c.size(0),
                                                     sum.size(1),
                                                     embedding_c.size(1)};
    torch::stable::parallel_for(
        0, params.dimension, kColumnsPerTask,
        [&](int64_t begin, int64_t end) { cpu::class_centroids_columns(params, begin, end); });
  });
  int64_t* counts = data<int64_t>(count);
  const int64_t* labels = data<const int64_t>(label_c);
  const bool* synthetic = data<const bool>(is_synthetic_c);
  for (int64_t i = 0; i < label_c.size(0); ++i) {
    ++counts[labels[i] + (synthetic[i] ? count.size(1) : 0)];
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mts_fast, CPU, m) {
  m.impl("class_centroids_", TORCH_BOX(&class_centroids_));
}

}  // namespace mts_fast
