// virtual_update on the CPU: theta' of all tensors in one pass, out of place.
#pragma once

#include <cstdint>

namespace mts_fast::cpu {

// Part of one tensor. A null pointer stands for zeros: the optimizer's state before its first step.
template <typename scalar_t>
struct UpdateSpan {
  const scalar_t* parameter;
  const scalar_t* gradient;
  const scalar_t* first;   // SGD: momentum buffer; Adam: exp_avg
  const scalar_t* second;  // Adam: exp_avg_sq
  const scalar_t* along;   // adam_direction_span: v
  scalar_t* out;           // theta'; adam_direction_span: kappa * v
  int64_t count;
  int64_t* masked;  // adam_direction_span, out: number of entries of kappa masked as noise
};

// Hyper-parameters, named as in torch.optim.SGD.
struct SgdParams {
  double lr;
  double momentum;
  double dampening;
  double weight_decay;
  bool nesterov;
  bool maximize;
};

// Hyper-parameters, named as in torch.optim.Adam; step: steps taken so far; decoupled: the decay
// of AdamW.
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

// theta' of a span. Results are rounded where the reference's tensor operations round: SGD gives
// the same bits, Adam all but the last bit of a division.
void sgd_span(const SgdParams& params, const UpdateSpan<float>& span);
void sgd_span(const SgdParams& params, const UpdateSpan<double>& span);
void adam_span(const AdamParams& params, const UpdateSpan<float>& span);
void adam_span(const AdamParams& params, const UpdateSpan<double>& span);

// kappa * v of a span, with kappa = lr times the slope of Adam's step by the gradient; kappa is 0
// where the root of the second moment is below `floor`, or 0. params.lr is that of kappa.
void adam_direction_span(const AdamParams& params, double floor, const UpdateSpan<float>& span);
void adam_direction_span(const AdamParams& params, double floor, const UpdateSpan<double>& span);

}  // namespace mts_fast::cpu
