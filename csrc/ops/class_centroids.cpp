// class_centroids: torch's stable ABI on one side, the plain C++ kernel on the other.
#include "../cpu/class_centroids.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace mts_fast {
namespace {

using torch::stable::Tensor;

// columns per task: two cache lines of the sums, so that threads never write to the same one.
constexpr int64_t kColumnsPerTask = 16;

template <typename scalar_t>
void run(const Tensor& embedding, const Tensor& label, const Tensor& is_synthetic, Tensor& sum) {
  const cpu::ClassCentroidsParams<scalar_t> params{
      static_cast<const scalar_t*>(embedding.data_ptr()),
      static_cast<const int64_t*>(label.data_ptr()),
      static_cast<const bool*>(is_synthetic.data_ptr()),
      static_cast<double*>(sum.data_ptr()),
      embedding.size(0),
      sum.size(1),
      embedding.size(1)};
  torch::stable::parallel_for(
      0, params.dimension, kColumnsPerTask,
      [&](int64_t begin, int64_t end) { cpu::class_centroids_columns(params, begin, end); });
}

void class_centroids_(const Tensor& embedding, const Tensor& label, const Tensor& is_synthetic,
                      Tensor sum, Tensor count) {
  // the Python op has checked shapes, dtypes and ranges; strides are this layer's business.
  const Tensor embedding_c = torch::stable::contiguous(embedding);
  const Tensor label_c = torch::stable::contiguous(label);
  const Tensor is_synthetic_c = torch::stable::contiguous(is_synthetic);
  if (embedding_c.scalar_type() == torch::headeronly::ScalarType::Double) {
    run<double>(embedding_c, label_c, is_synthetic_c, sum);
  } else {
    run<float>(embedding_c, label_c, is_synthetic_c, sum);
  }
  int64_t* counts = static_cast<int64_t*>(count.data_ptr());
  const int64_t* labels = static_cast<const int64_t*>(label_c.data_ptr());
  const bool* synthetic = static_cast<const bool*>(is_synthetic_c.data_ptr());
  for (int64_t i = 0; i < label_c.size(0); ++i) {
    ++counts[labels[i] + (synthetic[i] ? count.size(1) : 0)];
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mts_fast, CPU, m) {
  m.impl("class_centroids_", TORCH_BOX(&class_centroids_));
}

}  // namespace mts_fast
