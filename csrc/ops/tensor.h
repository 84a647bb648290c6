// Helpers of all ops over torch's stable ABI: typed pointers, and dispatch by scalar type.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

namespace mts_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// Calls run<double>() for a float64 tensor, else run<float>(): the Python ops admit only these two.
template <typename Run>
auto with_scalar_type(const Tensor& tensor, Run&& run) {
  if (tensor.scalar_type() == ScalarType::Double) return run.template operator()<double>();
  return run.template operator()<float>();
}

}  // namespace mts_fast
