// virtual_update on the CPU: 16 bytes of float32 per parameter with SGD and momentum, 20 with Adam,
// where tensor operations one after another move two to four times that.
#include "virtual_update.h"

#include <cmath>

#include "targets.h"

namespace mts_fast::cpu {
namespace {

enum class Momentum { none, plain, nesterov };

// What is known before the loop is a template parameter, so that no branch is left in it.
template <typename scalar_t, Momentum kMomentum, bool kStarted>
MTS_FAST_INLINE void sgd_loop(const SgdParams& params, const UpdateSpan<scalar_t>& span) {
  const scalar_t* __restrict__ parameter = span.parameter;
  const scalar_t* __restrict__ gradient = span.gradient;
  const scalar_t* __restrict__ old = span.first;
  scalar_t* __restrict__ out = span.out;
  const scalar_t sign = params.maximize ? scalar_t(-1) : scalar_t(1);
  const scalar_t lr = static_cast<scalar_t>(params.lr);
  // adding 0 * parameter would be the same number, but for infinite parameters.
  const scalar_t decay = static_cast<scalar_t>(params.weight_decay);
  const scalar_t momentum = static_cast<scalar_t>(params.momentum);
  const scalar_t fresh = static_cast<scalar_t>(1.0 - params.dampening);
  const bool decays = params.weight_decay != 0;
  for (int64_t i = 0; i < span.count; ++i) {
    scalar_t step = sign * gradient[i];
    step = decays ? step + decay * parameter[i] : step;
    if constexpr (kMomentum != Momentum::none) {
      scalar_t buffer = step;
      if constexpr (kStarted) buffer = momentum * old[i] + fresh * step;
      step = kMomentum == Momentum::nesterov ? step + momentum * buffer : buffer;
    }
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
  const scalar_t kept =
      static_cast<scalar_t>(params.decoupled ? 1.0 - params.lr * params.weight_decay : 1.0);
  const scalar_t beta1 = static_cast<scalar_t>(params.beta1);
  const scalar_t beta2 = static_cast<scalar_t>(params.beta2);
  const scalar_t fresh1 = static_cast<scalar_t>(1.0 - params.beta1);
  const scalar_t fresh2 = static_cast<scalar_t>(1.0 - params.beta2);
  const double steps = params.step + 1.0;
  const scalar_t correction1 = static_cast<scalar_t>(1.0 - std::pow(params.beta1, steps));
  const scalar_t correction2 = static_cast<scalar_t>(1.0 - std::pow(params.beta2, steps));
  for (int64_t i = 0; i < span.count; ++i) {
    scalar_t g = sign * gradient[i];
    g = decays ? g + decay * parameter[i] : g;
    scalar_t mean = fresh1 * g;
    scalar_t square = fresh2 * g * g;
    if constexpr (kStarted) {
      mean = beta1 * old_mean[i] + mean;
      square = beta2 * old_square[i] + square;
    }
    const scalar_t root = std::sqrt(square / correction2);
    out[i] = parameter[i] * kept - lr * (mean / correction1) / (root + eps);
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

}  // namespace

#define MTS_FAST_UPDATES(scalar_t)                                                              \
  MTS_FAST_FOR_EVERY_ISA(sgd_span, sgd, (const SgdParams& p, const UpdateSpan<scalar_t>& s),    \
                         (p, s))                                                                \
  MTS_FAST_FOR_EVERY_ISA(adam_span, adam, (const AdamParams& p, const UpdateSpan<scalar_t>& s), \
                         (p, s))
MTS_FAST_UPDATES(float)
MTS_FAST_UPDATES(double)

}  // namespace mts_fast::cpu
