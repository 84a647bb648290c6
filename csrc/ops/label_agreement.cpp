// label_agreement: torch's stable ABI on one side, the plain C++ kernel on the other.
#include "../cpu/label_agreement.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <tuple>

namespace mts_fast {
namespace {

using torch::stable::Tensor;

// rows per task: a row costs some ten nanoseconds, so a task is well above thread start-up.
constexpr int64_t kRowsPerTask = 4096;

template <typename scalar_t>
void run(const Tensor& similarity, const Tensor& neighbor, const Tensor& label, double epsilon,
         Tensor& plain, Tensor& weighted) {
  const cpu::LabelAgreementParams<scalar_t> params{
      static_cast<const scalar_t*>(similarity.data_ptr()),
      static_cast<const int64_t*>(neighbor.data_ptr()),
      static_cast<const int64_t*>(label.data_ptr()),
      static_cast<scalar_t*>(plain.data_ptr()),
      static_cast<scalar_t*>(weighted.data_ptr()),
      similarity.size(0),
      similarity.size(1),
      epsilon};
  std::atomic<int64_t> bad_row{-1};
  torch::stable::parallel_for(0, params.num_samples, kRowsPerTask, [&](int64_t begin, int64_t end) {
    const int64_t row = cpu::label_agreement_rows(params, begin, end);
    if (row >= 0) bad_row.store(row);
  });
  STD_TORCH_CHECK(bad_row.load() < 0, "label_agreement: neighbors must be in [0, ",
                  params.num_samples, "), but row ", bad_row.load(), " names one outside");
}

std::tuple<Tensor, Tensor> label_agreement(const Tensor& similarity, const Tensor& neighbor,
                                           const Tensor& label, double epsilon) {
  // the Python op has checked shapes and dtypes; strides are this layer's business.
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

STABLE_TORCH_LIBRARY_IMPL(mts_fast, CPU, m) {
  m.impl("label_agreement", TORCH_BOX(&label_agreement));
}

}  // namespace mts_fast
