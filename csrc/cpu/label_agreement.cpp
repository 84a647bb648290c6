// label_agreement on the CPU: one pass over the neighbour lists, no [N, K] temporaries.
#include "label_agreement.h"

namespace mts_fast::cpu {

template <typename scalar_t>
int64_t label_agreement_rows(const LabelAgreementParams<scalar_t>& params, int64_t begin,
                             int64_t end) {
  const int64_t k = params.num_neighbors;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t* neighbor = params.neighbor + i * k;
    const scalar_t* similarity = params.similarity + i * k;
    // 1. sum over the neighbours, in double: K is small, so it costs nothing, and float32 results
    // are rounded once.
    int64_t matches = 0;
    double matching = 0.0;
    double total = 0.0;
    for (int64_t j = 0; j < k; ++j) {
      if (neighbor[j] < 0 || neighbor[j] >= params.num_samples) return i;
      const bool same = params.label[neighbor[j]] == params.label[i];
      matches += same;
      matching += same ? similarity[j] : 0.0;
      total += similarity[j];
    }
    // 2. shares of the neighbours with the same label
    params.plain[i] = static_cast<scalar_t>(static_cast<double>(matches) / static_cast<double>(k));
    params.weighted[i] = static_cast<scalar_t>(matching / (total + params.epsilon));
  }
  return -1;
}

template int64_t label_agreement_rows<float>(const LabelAgreementParams<float>&, int64_t, int64_t);
template int64_t label_agreement_rows<double>(const LabelAgreementParams<double>&, int64_t,
                                              int64_t);

}  // namespace mts_fast::cpu
