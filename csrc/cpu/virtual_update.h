// virtual_update on the CPU: theta' of all tensors in one pass, out of place.
#pragma once

#include <cstdint>

namespace mts_fast::cpu {

// Part of one tensor. What is null counts as 0: a state before the optimizer's first step.
template <typename scalar_t>
struct UpdateSpan {
  const scalar_t* parameter;
  const scalar_t* gradient;
  const scalar_t* first;   // SGD: momentum buffer; Adam: exp_avg
  const scalar_t* second;  // Adam: exp_avg_sq
  const scalar_t* along;   // of a direction: v
  scalar_t* out;           // theta'; of a direction: kappa * v
  int64_t count;
  int64_t* masked;  // of a direction, out: entries of kappa that were taken for noise
};

// As torch.optim.SGD names them.
struct SgdParams {
  double lr;
  double momentum;
  double dampening;
  double weight_decay;
  bool nesterov;
  bool maximize;
};

// As torch.optim.Adam names them; step: taken so far; decoupled: AdamW's decay.
struct AdamParams {
  double lr;
  double beta1;
  double beta2;
  double eps;
  double weight_decay;
  double step;
  bool decoupled;
  bool maximize;
};

// They round where the reference's tensor operations round: SGD gives the same bits, Adam does but
// for the last one of a division.
void sgd_span(const SgdParams& params, const UpdateSpan<float>& span);
void sgd_span(const SgdParams& params, const UpdateSpan<double>& span);
void adam_span(const AdamParams& params, const UpdateSpan<float>& span);
void adam_span(const AdamParams& params, const UpdateSpan<double>& span);

// kappa = lr * slope of theta' by the gradient, times v; 0 where the root of the second moment is
// below `floor`, or 0. params.lr: that of kappa.
void adam_direction_span(const AdamParams& params, double floor, const UpdateSpan<float>& span);
void adam_direction_span(const AdamParams& params, double floor, const UpdateSpan<double>& span);

}  // namespace mts_fast::cpu
