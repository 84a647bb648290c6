// hypergradient_dot: torch's stable ABI on one side, the plain C++ kernel on the other.
#include "../cpu/hypergradient_dot.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

namespace mts_fast {
namespace {

using torch::stable::Tensor;

// products per task: some ten microseconds.
constexpr int64_t kProductsPerTask = 65536;

template <typename scalar_t>
void run(const Tensor& x, const Tensor& y, Tensor& out) {
  const int64_t length = x.size(1);
  const int64_t rows_per_task =
      std::max<int64_t>(kProductsPerTask / std::max<int64_t>(length, 1), 1);
  torch::stable::parallel_for(0, x.size(0), rows_per_task, [&](int64_t begin, int64_t end) {
    cpu::hypergradient_dot_rows(static_cast<const scalar_t*>(x.data_ptr()),
                                static_cast<const scalar_t*>(y.data_ptr()),
                                static_cast<scalar_t*>(out.data_ptr()), length, begin, end);
  });
}

Tensor hypergradient_dot(const Tensor& x, const Tensor& y) {
  // the caller passes [B, n] contiguous tensors of one dtype.
  Tensor out = torch::stable::new_empty(x, {x.size(0)});
  if (x.scalar_type() == torch::headeronly::ScalarType::Double) {
    run<double>(x, y, out);
  } else {
    run<float>(x, y, out);
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mts_fast, CPU, m) {
  m.impl("hypergradient_dot", TORCH_BOX(&hypergradient_dot));
}

}  // namespace mts_fast
