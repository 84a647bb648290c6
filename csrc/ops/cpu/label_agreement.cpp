// label_agreement: torch's stable ABI on one side, the plain C++ kernel on the other.
#include "../../cpu/label_agreement.h"

#include <atomic>
#include <tuple>

#include "../label_agreement.h"

namespace mts_fast {
namespace {

// rows per task: a row costs some ten nanoseconds, so a task takes much longer than a thread start.
constexpr int64_t kRowsPerTask = 4096;

std::tuple<Tensor, Tensor> label_agreement(const Tensor& similarity, const Tensor& neighbor,
                                           const Tensor& label, double epsilon) {
  return label_agreement_by(similarity, neighbor, label, epsilon, [](const auto& params) {
    std::atomic<int64_t> bad_row{-1};
    torch::stable::parallel_for(0, params.num_samples, kRowsPerTask,
                                [&](int64_t begin, int64_t end) {
                                  const int64_t row = cpu::label_agreement_rows(params, begin, end);
                                  if (row >= 0) bad_row.store(row);
                                });
    STD_TORCH_CHECK(bad_row.load() < 0, "label_agreement: neighbors must be in [0, ",
                    params.num_samples, "), but row ", bad_row.load(), " names one outside");
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mts_fast, CPU, m) {
  m.impl("label_agreement", TORCH_BOX(&label_agreement));
}

}  // namespace mts_fast
