// hypergradient_dot on the CPU: the product and the sum of row 6 in one pass.
#pragma once

#include <cstdint>

namespace mts_fast::cpu {

// out[i] = <x_i, y_i> of rows [begin, end) of x and y [rows, length], contiguous. Sums of kDotBlock
// products in the type of x, and over the blocks in double.
void hypergradient_dot_rows(const float* x, const float* y, float* out, int64_t length,
                            int64_t begin, int64_t end);
void hypergradient_dot_rows(const double* x, const double* y, double* out, int64_t length,
                            int64_t begin, int64_t end);

}  // namespace mts_fast::cpu
