// virtual_update: torch's stable ABI on one side, the plain C++ kernels on the other.
#include "../cpu/virtual_update.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <numeric>
#include <vector>

namespace mts_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// elements per task: 128 KiB of each stream, some ten microseconds.
constexpr int64_t kSpan = 32768;

template <typename scalar_t>
const scalar_t* data(const std::vector<Tensor>& tensors, size_t i) {
  return tensors.empty() ? nullptr : static_cast<const scalar_t*>(tensors[i].data_ptr());
}

// All tensors cut into spans of at most kSpan elements.
template <typename scalar_t>
std::vector<cpu::UpdateSpan<scalar_t>> cut(const std::vector<Tensor>& parameters,
                                           const std::vector<Tensor>& gradients,
                                           const std::vector<Tensor>& first,
                                           const std::vector<Tensor>& second,
                                           const std::vector<Tensor>& out) {
  std::vector<cpu::UpdateSpan<scalar_t>> spans;
  const auto at = [](const scalar_t* p, int64_t offset) { return p ? p + offset : nullptr; };
  for (size_t i = 0; i < parameters.size(); ++i) {
    const int64_t size = parameters[i].numel();
    for (int64_t begin = 0; begin < size; begin += kSpan) {
      spans.push_back({data<scalar_t>(parameters, i) + begin, data<scalar_t>(gradients, i) + begin,
                       at(data<scalar_t>(first, i), begin), at(data<scalar_t>(second, i), begin),
                       static_cast<scalar_t*>(out[i].data_ptr()) + begin,
                       std::min(kSpan, size - begin)});
    }
  }
  return spans;
}

void update(const cpu::SgdParams& params, const auto& span) { cpu::sgd_span(params, span); }
void update(const cpu::AdamParams& params, const auto& span) { cpu::adam_span(params, span); }

template <typename scalar_t, typename Params>
void run(const Params& params, const std::vector<Tensor>& parameters,
         const std::vector<Tensor>& gradients, const std::vector<Tensor>& first,
         const std::vector<Tensor>& second, const std::vector<Tensor>& out) {
  const auto spans = cut<scalar_t>(parameters, gradients, first, second, out);
  const int64_t count = static_cast<int64_t>(spans.size());
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) update(params, spans[i]);
  });
}

// The Python op has checked that the tensors of a parameter lie in memory alike, without gaps, and
// that all are of one dtype.
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
  if (parameters.front().scalar_type() == ScalarType::Double) {
    run<double>(params, parameters, gradients, buffers, {}, out);
  } else {
    run<float>(params, parameters, gradients, buffers, {}, out);
  }
  return out;
}

std::vector<Tensor> virtual_update_adam(std::vector<Tensor> parameters,
                                        std::vector<Tensor> gradients, std::vector<Tensor> exp_avg,
                                        std::vector<Tensor> exp_avg_sq, double lr, double beta1,
                                        double beta2, double eps, double weight_decay, double step,
                                        bool decoupled, bool maximize) {
  const cpu::AdamParams params{lr, beta1, beta2, eps, weight_decay, step, decoupled, maximize};
  const std::vector<Tensor> out = empty_like(parameters);
  if (parameters.front().scalar_type() == ScalarType::Double) {
    run<double>(params, parameters, gradients, exp_avg, exp_avg_sq, out);
  } else {
    run<float>(params, parameters, gradients, exp_avg, exp_avg_sq, out);
  }
  return out;
}

template <typename scalar_t>
int64_t run_direction(const cpu::AdamParams& params, double floor,
                      const std::vector<Tensor>& parameters, const std::vector<Tensor>& gradients,
                      const std::vector<Tensor>& first, const std::vector<Tensor>& second,
                      const std::vector<Tensor>& along, const std::vector<Tensor>& out) {
  const auto spans = cut<scalar_t>(parameters, gradients, first, second, out);
  // v is cut as everything else is: its place in a span's tensor is that of the gradient
  const auto others = cut<scalar_t>(along, along, {}, {}, out);
  const int64_t count = static_cast<int64_t>(spans.size());
  std::vector<int64_t> masked(spans.size());
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      cpu::adam_direction_span(
          params, floor, cpu::DirectionSpan<scalar_t>{spans[i], others[i].gradient, &masked[i]});
    }
  });
  return std::accumulate(masked.begin(), masked.end(), int64_t{0});
}

// kappa * along of every parameter, and last how many entries were masked.
std::vector<Tensor> hypergradient_direction_adam(
    std::vector<Tensor> parameters, std::vector<Tensor> gradients, std::vector<Tensor> exp_avg,
    std::vector<Tensor> exp_avg_sq, std::vector<Tensor> along, double floor, double lr,
    double beta1, double beta2, double eps, double weight_decay, double step, bool decoupled,
    bool maximize) {
  const cpu::AdamParams params{lr, beta1, beta2, eps, weight_decay, step, decoupled, maximize};
  std::vector<Tensor> out = empty_like(parameters);
  const bool wide = parameters.front().scalar_type() == ScalarType::Double;
  const int64_t masked = wide ? run_direction<double>(params, floor, parameters, gradients, exp_avg,
                                                      exp_avg_sq, along, out)
                              : run_direction<float>(params, floor, parameters, gradients, exp_avg,
                                                     exp_avg_sq, along, out);
  Tensor total = torch::stable::new_empty(parameters.front(), {}, ScalarType::Long);
  *static_cast<int64_t*>(total.data_ptr()) = masked;
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
