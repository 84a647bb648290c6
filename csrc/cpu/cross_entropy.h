// cross_entropy on the CPU: losses and their gradient without a matrix of log-probabilities.
#pragma once

#include <cstdint>

namespace mts_fast::cpu {

struct CrossEntropyParams {
  const float* logit;    // [rows, classes], contiguous
  const int64_t* label;  // [rows], in [0, classes) or ignored
  int64_t classes;
  int64_t ignored;  // the label of rows without loss and gradient
};

// For rows [begin, end):
//   maximum[i] = max_c logit_ic
//   log_sum[i] = log sum_c exp(logit_ic - maximum[i])
//   loss[i]    = log_sum[i] - (logit_iy - maximum[i])
// The backward needs maximum and log_sum; as one sum, log_sum would lose its digits to large
// logits. Returns the first row with a label out of range, or -1.
int64_t cross_entropy_rows(const CrossEntropyParams& params, float* loss, float* maximum,
                           float* log_sum, int64_t begin, int64_t end);

// out[i, c] = grad[i] (softmax_ic - [c = y_i]), with softmax_ic = exp(logit_ic - maximum[i] -
// log_sum[i]); 0 in ignored rows.
void cross_entropy_backward_rows(const CrossEntropyParams& params, const float* maximum,
                                 const float* log_sum, const float* grad, float* out, int64_t begin,
                                 int64_t end);

}  // namespace mts_fast::cpu
