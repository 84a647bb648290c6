// sample_dot: torch's stable ABI on one side, the plain C++ kernel on the other.
#include "../../cpu/sample_dot.h"

#include <algorithm>
#include <vector>

#include "../tensor.h"

namespace mts_fast {
namespace {

// entries per task: 128 KiB of each tensor, some five microseconds.
constexpr int64_t kSpan = 32768;

// The Python op has checked that both have one dtype and one memory layout, in which samples follow
// one another without gaps.
Tensor sample_dot(const Tensor& x, const Tensor& y) {
  const int64_t size = x.size(0);
  Tensor out = torch::stable::new_empty(x, {size});
  const int64_t length = size ? x.numel() / size : 0;
  // 1. samples cut into spans of equal number, one task each
  const int64_t spans = std::max<int64_t>((length + kSpan - 1) / kSpan, 1);
  const int64_t grain = std::max<int64_t>(kSpan / std::max<int64_t>(length, 1), 1);
  with_scalar_type(x, [&]<typename scalar_t>() {
    const scalar_t* left = data<const scalar_t>(x);
    const scalar_t* right = data<const scalar_t>(y);
    std::vector<double> sums(size * spans);
    torch::stable::parallel_for(0, size * spans, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t start = i % spans * kSpan;
        const int64_t at = i / spans * length + start;
        sums[i] = cpu::dot_span(left + at, right + at, std::min(kSpan, length - start));
      }
    });
    // 2. the spans of each sample, in order
    scalar_t* dots = data<scalar_t>(out);
    for (int64_t i = 0; i < size; ++i) {
      double total = 0;
      for (int64_t s = 0; s < spans; ++s) total += sums[i * spans + s];
      dots[i] = static_cast<scalar_t>(total);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mts_fast, CPU, m) {
  m.impl("sample_dot", TORCH_BOX(&sample_dot));
}

}  // namespace mts_fast
