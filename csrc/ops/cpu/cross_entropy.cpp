// cross_entropy: torch's stable ABI on one side, the plain C++ kernel on the other.
#include "../../cpu/cross_entropy.h"

#include <algorithm>
#include <atomic>
#include <tuple>

#include "../tensor.h"

namespace mts_fast {
namespace {

// logits per task: their exponentials take some ten microseconds.
constexpr int64_t kLogitsPerTask = 32768;

int64_t rows_per_task(int64_t classes) {
  return std::max<int64_t>(kLogitsPerTask / std::max<int64_t>(classes, 1), 1);
}

cpu::CrossEntropyParams make_params(const Tensor& logit, const Tensor& label, int64_t ignored) {
  return {data<const float>(logit), data<const int64_t>(label), logit.size(1), ignored};
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy(const Tensor& logit, const Tensor& label,
                                                 int64_t ignored) {
  // the Python op passes contiguous float32 logits [rows, classes] and int64 labels.
  const cpu::CrossEntropyParams params = make_params(logit, label, ignored);
  Tensor loss = torch::stable::new_empty(logit, {logit.size(0)});
  Tensor maximum = torch::stable::new_empty(logit, {logit.size(0)});
  Tensor log_sum = torch::stable::new_empty(logit, {logit.size(0)});
  std::atomic<int64_t> bad_row{-1};
  torch::stable::parallel_for(
      0, logit.size(0), rows_per_task(params.classes), [&](int64_t begin, int64_t end) {
        const int64_t row = cpu::cross_entropy_rows(params, data<float>(loss), data<float>(maximum),
                                                    data<float>(log_sum), begin, end);
        if (row >= 0) bad_row.store(row);
      });
  STD_TORCH_CHECK(bad_row.load() < 0, "cross_entropy: labels must be in [0, ", params.classes,
                  "), but row ", bad_row.load(), " has one outside");
  return {loss, maximum, log_sum};
}

Tensor cross_entropy_backward(const Tensor& logit, const Tensor& label, const Tensor& maximum,
                              const Tensor& log_sum, const Tensor& grad, int64_t ignored) {
  const cpu::CrossEntropyParams params = make_params(logit, label, ignored);
  const Tensor grad_c = torch::stable::contiguous(grad);
  Tensor out = torch::stable::empty_like(logit);
  torch::stable::parallel_for(
      0, logit.size(0), rows_per_task(params.classes), [&](int64_t begin, int64_t end) {
        cpu::cross_entropy_backward_rows(params, data<const float>(maximum),
                                         data<const float>(log_sum), data<const float>(grad_c),
                                         data<float>(out), begin, end);
      });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mts_fast, CPU, m) {
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
  m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward));
}

}  // namespace mts_fast
