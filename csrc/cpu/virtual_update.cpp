// virtual_update on the CPU. Bytes moved per float32 parameter: 16 with SGD and momentum, 20 with
// Adam; a sequence of tensor operations moves two to four times as many. kappa * along of Adam: 24
// bytes; tensor operations move some 200.
#include "virtual_update.h"

#include <cmath>
#include <type_traits>

#include "targets.h"

namespace mts_fast::cpu {
namespace {

enum class Momentum { none, plain, nesterov };

// Options are template parameters, so that the loop has no branch on them. With g = sign gradient +
// decay parameter:
//   buffer' = momentum buffer + fresh g            (g alone at the first step)
//   theta'  = parameter - lr buffer'               (nesterov: g + momentum buffer'; none: g)
template <typename scalar_t, Momentum kMomentum, bool kStarted>
MTS_FAST_INLINE void sgd_loop(const SgdParams& params, const UpdateSpan<scalar_t>& span) {
  const scalar_t* __restrict__ parameter = span.parameter;
  const scalar_t* __restrict__ gradient = span.gradient;
  const scalar_t* __restrict__ old = span.first;
  scalar_t* __restrict__ out = span.out;
  const scalar_t sign = params.maximize ? scalar_t(-1) : scalar_t(1);
  const scalar_t lr = static_cast<scalar_t>(params.lr);
  const scalar_t decay = static_cast<scalar_t>(params.weight_decay);
  const scalar_t momentum = static_cast<scalar_t>(params.momentum);
  const scalar_t fresh = static_cast<scalar_t>(1.0 - params.dampening);
  // without weight decay the parameter is not added, as 0 * parameter is NaN where it is infinite.
  const bool decays = params.weight_decay != 0;
  for (int64_t i = 0; i < span.count; ++i) {
    // 1. gradient with sign and decay
    scalar_t step = sign * gradient[i];
    step = decays ? step + decay * parameter[i] : step;
    // 2. momentum
    if constexpr (kMomentum != Momentum::none) {
      scalar_t buffer = step;
      if constexpr (kStarted) buffer = momentum * old[i] + fresh * step;
      step = kMomentum == Momentum::nesterov ? step + momentum * buffer : buffer;
    }
    // 3. theta'
    out[i] = parameter[i] - lr * step;
  }
}

template <typename scalar_t, bool kStarted>
MTS_FAST_INLINE void sgd_started(const SgdParams& params, const UpdateSpan<scalar_t>& span) {
  if (params.momentum == 0) {
    sgd_loop<scalar_t, Momentum::none, kStarted>(params, span);
  } else if (params.nesterov) {
    sgd_loop<scalar_t, Momentum::nesterov, kStarted>(params, span);
  } else {
    sgd_loop<scalar_t, Momentum::plain, kStarted>(params, span);
  }
}

template <typename scalar_t>
MTS_FAST_INLINE void sgd(const SgdParams& params, const UpdateSpan<scalar_t>& span) {
  if (span.first == nullptr) {
    sgd_started<scalar_t, false>(params, span);
  } else {
    sgd_started<scalar_t, true>(params, span);
  }
}

// With g = sign gradient + decay parameter and the old moments m0 and v0 (0 before the first step):
//   m      = beta1 m0 + (1 - beta1) g
//   v      = beta2 v0 + (1 - beta2) g^2
//   theta' = shrink parameter - lr (m / correction1) / (sqrt(v / correction2) + eps)
// with correction = 1 - beta^(steps taken + 1), and shrink = 1 - lr weight_decay under AdamW,
// else 1.
template <typename scalar_t, bool kStarted>
MTS_FAST_INLINE void adam_loop(const AdamParams& params, const UpdateSpan<scalar_t>& span) {
  const scalar_t* __restrict__ parameter = span.parameter;
  const scalar_t* __restrict__ gradient = span.gradient;
  const scalar_t* __restrict__ old_mean = span.first;
  const scalar_t* __restrict__ old_square = span.second;
  scalar_t* __restrict__ out = span.out;
  const scalar_t sign = params.maximize ? scalar_t(-1) : scalar_t(1);
  const scalar_t lr = static_cast<scalar_t>(params.lr);
  const scalar_t eps = static_cast<scalar_t>(params.eps);
  const bool decays = !params.decoupled && params.weight_decay != 0;
  const scalar_t decay = static_cast<scalar_t>(params.weight_decay);
  const scalar_t shrink =
      static_cast<scalar_t>(params.decoupled ? 1.0 - params.lr * params.weight_decay : 1.0);
  const scalar_t beta1 = static_cast<scalar_t>(params.beta1);
  const scalar_t beta2 = static_cast<scalar_t>(params.beta2);
  const scalar_t fresh1 = static_cast<scalar_t>(1.0 - params.beta1);
  const scalar_t fresh2 = static_cast<scalar_t>(1.0 - params.beta2);
  const double steps = params.step + 1.0;
  const scalar_t correction1 = static_cast<scalar_t>(1.0 - std::pow(params.beta1, steps));
  const scalar_t correction2 = static_cast<scalar_t>(1.0 - std::pow(params.beta2, steps));
  for (int64_t i = 0; i < span.count; ++i) {
    // 1. gradient with sign and decay
    scalar_t g = sign * gradient[i];
    g = decays ? g + decay * parameter[i] : g;
    // 2. moments
    scalar_t mean = fresh1 * g;
    scalar_t square = fresh2 * g * g;
    if constexpr (kStarted) {
      mean = beta1 * old_mean[i] + mean;
      square = beta2 * old_square[i] + square;
    }
    // 3. theta'
    const scalar_t root = std::sqrt(square / correction2);
    out[i] = parameter[i] * shrink - lr * (mean / correction1) / (root + eps);
  }
}

template <typename scalar_t>
MTS_FAST_INLINE void adam(const AdamParams& params, const UpdateSpan<scalar_t>& span) {
  if (span.first == nullptr) {
    adam_loop<scalar_t, false>(params, span);
  } else {
    adam_loop<scalar_t, true>(params, span);
  }
}

// kappa * along. With g as above and the bias-corrected moments
//   m   = kept1 m0 + fresh1 g,      kept1 = beta1 / correction1, fresh1 = (1 - beta1) / correction1
//   r^2 = kept2 v0 + fresh2 g^2,    kept2 and fresh2 likewise
// the slope of Adam's step is, as the terms in g^2 cancel,
//   d/dg [m / (r + eps)] = (fresh1 (r + eps) - m fresh2 g / r) / (r + eps)^2
//     = (eps fresh1 + (fresh1 kept2 v0 - kept1 fresh2 m0 g) / r) / (r + eps)^2
//   kappa = sign lr slope, and 0 where r < noise_floor or r = 0.
template <typename scalar_t, bool kStarted>
MTS_FAST_INLINE void adam_direction_loop(const AdamParams& params, double floor,
                                         const UpdateSpan<scalar_t>& span) {
  const scalar_t* __restrict__ parameter = span.parameter;
  const scalar_t* __restrict__ gradient = span.gradient;
  const scalar_t* __restrict__ old_mean = span.first;
  const scalar_t* __restrict__ old_square = span.second;
  const scalar_t* __restrict__ along = span.along;
  scalar_t* __restrict__ out = span.out;
  const scalar_t sign = params.maximize ? scalar_t(-1) : scalar_t(1);
  const scalar_t lr = static_cast<scalar_t>(params.maximize ? -params.lr : params.lr);
  const scalar_t eps = static_cast<scalar_t>(params.eps);
  const bool decays = !params.decoupled && params.weight_decay != 0;
  const scalar_t decay = static_cast<scalar_t>(params.weight_decay);
  const double steps = params.step + 1.0;
  const double correction1 = 1.0 - std::pow(params.beta1, steps);
  const double correction2 = 1.0 - std::pow(params.beta2, steps);
  const double fresh1 = (1.0 - params.beta1) / correction1, kept1 = params.beta1 / correction1;
  const double fresh2 = (1.0 - params.beta2) / correction2, kept2 = params.beta2 / correction2;
  const scalar_t square_fresh = static_cast<scalar_t>(fresh2);
  const scalar_t square_kept = static_cast<scalar_t>(kept2);
  const scalar_t slope_square = static_cast<scalar_t>(fresh1 * kept2);
  const scalar_t slope_mean = static_cast<scalar_t>(kept1 * fresh2);
  const scalar_t slope_eps = static_cast<scalar_t>(params.eps * fresh1);
  const scalar_t noise_floor = static_cast<scalar_t>(floor);
  // an integer of scalar_t's size, so that it is counted in the same vector lanes; it counts at
  // most the entries of one span.
  std::conditional_t<sizeof(scalar_t) == 4, int32_t, int64_t> masked = 0;
  for (int64_t i = 0; i < span.count; ++i) {
    // 1. gradient with sign and decay
    scalar_t g = sign * gradient[i];
    g = decays ? g + decay * parameter[i] : g;
    // 2. the root r of the second moment
    scalar_t square = square_fresh * (g * g);
    if constexpr (kStarted) square = square_kept * old_square[i] + square;
    const scalar_t root = std::sqrt(square);
    // 3. the slope
    scalar_t numerator = slope_eps;
    if constexpr (kStarted) {
      const scalar_t old = slope_square * old_square[i] - slope_mean * old_mean[i] * g;
      numerator = numerator + old / (root == 0 ? scalar_t(1) : root);
    }
    const scalar_t divisor = root + eps;
    // 4. kappa, masked where r is noise, times v
    const bool noise = root < noise_floor || root == 0;
    const scalar_t kappa = noise ? scalar_t(0) : lr * (numerator / (divisor * divisor));
    masked += noise;
    out[i] = kappa * along[i];
  }
  *span.masked = masked;
}

template <typename scalar_t>
MTS_FAST_INLINE void adam_direction(const AdamParams& params, double floor,
                                    const UpdateSpan<scalar_t>& span) {
  if (span.first == nullptr) {
    adam_direction_loop<scalar_t, false>(params, floor, span);
  } else {
    adam_direction_loop<scalar_t, true>(params, floor, span);
  }
}

}  // namespace

#define MTS_FAST_UPDATES(scalar_t)                                                              \
  MTS_FAST_FOR_EVERY_ISA(sgd_span, sgd, (const SgdParams& p, const UpdateSpan<scalar_t>& s),    \
                         (p, s))                                                                \
  MTS_FAST_FOR_EVERY_ISA(adam_span, adam, (const AdamParams& p, const UpdateSpan<scalar_t>& s), \
                         (p, s))                                                                \
  MTS_FAST_FOR_EVERY_ISA(adam_direction_span, adam_direction,                                   \
                         (const AdamParams& p, double f, const UpdateSpan<scalar_t>& s),        \
                         (p, f, s))
MTS_FAST_UPDATES(float)
MTS_FAST_UPDATES(double)

}  // namespace mts_fast::cpu
