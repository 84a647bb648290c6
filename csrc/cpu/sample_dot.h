// sample_dot on the CPU: products of two tensors summed over each sample.
#pragma once

#include <cstdint>

namespace mts_fast::cpu {

// sum of x_i y_i over `count` entries, in scalar_t within runs of 4096 and in double beyond.
double dot_span(const float* x, const float* y, int64_t count);
double dot_span(const double* x, const double* y, int64_t count);

}  // namespace mts_fast::cpu
