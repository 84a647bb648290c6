// Gradients of norms by sample: torch's stable ABI on one side, the plain C++ kernels on the other.
#include "../../cpu/norm_sample_gradients.h"

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../tensor.h"

namespace mts_fast {
namespace {

// entries per task: reading them takes some ten microseconds.
constexpr int64_t kEntriesPerTask = 32768;

int64_t tasks_of(int64_t entries) {
  return std::max<int64_t>(kEntriesPerTask / std::max<int64_t>(entries, 1), 1);
}

template <typename scalar_t>
const scalar_t* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? data<const scalar_t>(*tensor) : nullptr;
}

// The Python functions pass contiguous tensors of one dtype: x and b [B, T, C].
std::tuple<Tensor, Tensor> layer_norm_sample_gradients(const Tensor& x, const Tensor& b, double eps,
                                                       bool centered, bool has_bias) {
  const int64_t samples = x.size(0), positions = x.size(1), channels = x.size(2);
  Tensor weight = torch::stable::new_empty(x, {samples, channels});
  Tensor bias = torch::stable::new_empty(x, {has_bias ? samples : 0, channels});
  with_scalar_type(x, [&]<typename scalar_t>() {
    const cpu::LayerNormParams<scalar_t> params{data<const scalar_t>(x),
                                                data<const scalar_t>(b),
                                                data<scalar_t>(weight),
                                                has_bias ? data<scalar_t>(bias) : nullptr,
                                                positions,
                                                channels,
                                                eps,
                                                centered};
    torch::stable::parallel_for(
        0, samples, tasks_of(positions * channels), [&](int64_t begin, int64_t end) {
          std::vector<scalar_t> block(2 * channels);
          std::vector<double> total(2 * channels);
          cpu::layer_norm_sample_gradients(params, {block.data(), total.data()}, begin, end);
        });
  });
  return {weight, bias};
}

// x and b are [B, C, S]; mean and variance [C] or absent.
std::tuple<Tensor, Tensor> group_norm_sample_gradients(const Tensor& x, const Tensor& b,
                                                       int64_t groups, double eps,
                                                       const std::optional<Tensor>& mean,
                                                       const std::optional<Tensor>& variance) {
  const int64_t samples = x.size(0), channels = x.size(1), positions = x.size(2);
  // by passed statistics every channel is normalised alone.
  if (mean.has_value()) groups = channels;
  Tensor weight = torch::stable::new_empty(x, {samples, channels});
  Tensor bias = torch::stable::new_empty(x, {samples, channels});
  with_scalar_type(x, [&]<typename scalar_t>() {
    const cpu::GroupNormParams<scalar_t> params{data<const scalar_t>(x),
                                                data<const scalar_t>(b),
                                                data_or_null<scalar_t>(mean),
                                                data_or_null<scalar_t>(variance),
                                                data<scalar_t>(weight),
                                                data<scalar_t>(bias),
                                                channels / groups,
                                                groups,
                                                positions,
                                                eps};
    torch::stable::parallel_for(
        0, samples * groups, tasks_of(params.group_channels * positions),
        [&](int64_t begin, int64_t end) { cpu::group_norm_sample_gradients(params, begin, end); });
  });
  return {weight, bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mts_fast, CPU, m) {
  m.impl("layer_norm_sample_gradients", TORCH_BOX(&layer_norm_sample_gradients));
  m.impl("group_norm_sample_gradients", TORCH_BOX(&group_norm_sample_gradients));
}

}  // namespace mts_fast
