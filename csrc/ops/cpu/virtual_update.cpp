// virtual_update: torch's stable ABI on one side, the plain C++ kernels on the other.
#include "../../cpu/virtual_update.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "../tensor.h"

namespace mts_fast {
namespace {

// elements per task: 128 KiB of each stream, some ten microseconds.
constexpr int64_t kSpan = 32768;

// The streams of an update: each has one tensor per parameter, or is empty where it is absent.
struct Streams {
  const std::vector<Tensor>& parameters;
  const std::vector<Tensor>& gradients;
  const std::vector<Tensor>& first;
  const std::vector<Tensor>& second;
  const std::vector<Tensor>& along;
  const std::vector<Tensor>& out;
};

// Pointer to element `begin` of tensor i; null where the stream is absent.
template <typename scalar_t>
scalar_t* at(const std::vector<Tensor>& stream, size_t i, int64_t begin) {
  return stream.empty() ? nullptr : data<scalar_t>(stream[i]) + begin;
}

// All tensors cut into spans of at most kSpan elements.
template <typename scalar_t>
std::vector<cpu::UpdateSpan<scalar_t>> cut(const Streams& streams) {
  std::vector<cpu::UpdateSpan<scalar_t>> spans;
  for (size_t i = 0; i < streams.parameters.size(); ++i) {
    const int64_t size = streams.parameters[i].numel();
    for (int64_t begin = 0; begin < size; begin += kSpan) {
      spans.push_back({at<const scalar_t>(streams.parameters, i, begin),
                       at<const scalar_t>(streams.gradients, i, begin),
                       at<const scalar_t>(streams.first, i, begin),
                       at<const scalar_t>(streams.second, i, begin),
                       at<const scalar_t>(streams.along, i, begin),
                       at<scalar_t>(streams.out, i, begin), std::min(kSpan, size - begin),
                       nullptr});
    }
  }
  return spans;
}

// Runs `update` on every span, on torch's threads.
template <typename scalar_t, typename Update>
void for_each(const std::vector<cpu::UpdateSpan<scalar_t>>& spans, Update&& update) {
  const int64_t count = static_cast<int64_t>(spans.size());
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) update(spans[i]);
  });
}

// Outputs with the layout of the parameters. The Python op has checked that all tensors of a
// parameter have one memory layout without gaps, and that all tensors have one dtype.
std::vector<Tensor> empty_like(const std::vector<Tensor>& parameters) {
  std::vector<Tensor> out;
  out.reserve(parameters.size());
  for (const Tensor& parameter : parameters) out.push_back(torch::stable::empty_like(parameter));
  return out;
}

std::vector<Tensor> virtual_update_sgd(std::vector<Tensor> parameters,
                                       std::vector<Tensor> gradients, std::vector<Tensor> buffers,
                                       double lr, double momentum, double dampening,
                                       double weight_decay, bool nesterov, bool maximize) {
  const cpu::SgdParams params{lr, momentum, dampening, weight_decay, nesterov, maximize};
  const std::vector<Tensor> out = empty_like(parameters);
  with_scalar_type(parameters.front(), [&]<typename scalar_t>() {
    for_each(cut<scalar_t>({parameters, gradients, buffers, {}, {}, out}),
             [&](const auto& span) { cpu::sgd_span(params, span); });
  });
  return out;
}

std::vector<Tensor> virtual_update_adam(std::vector<Tensor> parameters,
                                        std::vector<Tensor> gradients, std::vector<Tensor> exp_avg,
                                        std::vector<Tensor> exp_avg_sq, double lr, double beta1,
                                        double beta2, double eps, double weight_decay, double step,
                                        bool decoupled, bool maximize) {
  const cpu::AdamParams params{lr, beta1, beta2, eps, weight_decay, step, decoupled, maximize};
  const std::vector<Tensor> out = empty_like(parameters);
  with_scalar_type(parameters.front(), [&]<typename scalar_t>() {
    for_each(cut<scalar_t>({parameters, gradients, exp_avg, exp_avg_sq, {}, out}),
             [&](const auto& span) { cpu::adam_span(params, span); });
  });
  return out;
}

// kappa * along of every parameter, and as the last tensor the number of masked entries.
std::vector<Tensor> hypergradient_direction_adam(
    std::vector<Tensor> parameters, std::vector<Tensor> gradients, std::vector<Tensor> exp_avg,
    std::vector<Tensor> exp_avg_sq, std::vector<Tensor> along, double floor, double lr,
    double beta1, double beta2, double eps, double weight_decay, double step, bool decoupled,
    bool maximize) {
  const cpu::AdamParams params{lr, beta1, beta2, eps, weight_decay, step, decoupled, maximize};
  std::vector<Tensor> out = empty_like(parameters);
  const Streams streams{parameters, gradients, exp_avg, exp_avg_sq, along, out};
  const int64_t masked = with_scalar_type(parameters.front(), [&]<typename scalar_t>() {
    auto spans = cut<scalar_t>(streams);
    std::vector<int64_t> counts(spans.size());
    for (size_t i = 0; i < spans.size(); ++i) spans[i].masked = &counts[i];
    for_each(spans, [&](const auto& span) { cpu::adam_direction_span(params, floor, span); });
    return std::accumulate(counts.begin(), counts.end(), int64_t{0});
  });
  Tensor total = torch::stable::new_empty(parameters.front(), {}, ScalarType::Long);
  *data<int64_t>(total) = masked;
  out.push_back(total);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mts_fast, CPU, m) {
  m.impl("virtual_update_sgd", TORCH_BOX(&virtual_update_sgd));
  m.impl("virtual_update_adam", TORCH_BOX(&virtual_update_adam));
  m.impl("hypergradient_direction_adam", TORCH_BOX(&hypergradient_direction_adam));
}

}  // namespace mts_fast
