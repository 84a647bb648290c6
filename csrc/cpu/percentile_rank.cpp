// percentile_rank on the CPU: counted into classes, then sorted class by class.
#include "percentile_rank.h"

#include <algorithm>

namespace mts_fast::cpu {

template <typename scalar_t>
void group_by_class(const PercentileRankParams<scalar_t>& params) {
  // 1. count the samples of each class
  int64_t* offset = params.offset;
  std::fill(offset, offset + params.num_classes + 1, 0);
  for (int64_t i = 0; i < params.num_samples; ++i) ++offset[params.label[i]];
  // 2. the end of each class, by a running sum
  for (int64_t c = 1; c <= params.num_classes; ++c) offset[c] += offset[c - 1];
  // 3. fill the classes from the back, which moves each offset to the beginning of its class
  for (int64_t i = params.num_samples - 1; i >= 0; --i) {
    params.sorted[--offset[params.label[i]]] = {params.value[i], i};
  }
}

template <typename scalar_t>
void percentile_rank_classes(const PercentileRankParams<scalar_t>& params, int64_t begin,
                             int64_t end) {
  for (int64_t c = begin; c < end; ++c) {
    Ranked<scalar_t>* first = params.sorted + params.offset[c];
    Ranked<scalar_t>* last = params.sorted + params.offset[c + 1];
    // 1. sort the class by value; equal values by index
    std::sort(first, last, [](const Ranked<scalar_t>& a, const Ranked<scalar_t>& b) {
      return a.value < b.value || (a.value == b.value && a.sample < b.sample);
    });
    // 2. ranks in [0, 1]; 0 in a class of one
    const scalar_t most = static_cast<scalar_t>(std::max<int64_t>(last - first - 1, 1));
    for (const Ranked<scalar_t>* p = first; p < last; ++p) {
      params.rank[p->sample] = static_cast<scalar_t>(p - first) / most;
    }
  }
}

#define MTS_FAST_INSTANTIATE(scalar_t)                                                            \
  template void group_by_class<scalar_t>(const PercentileRankParams<scalar_t>&);                  \
  template void percentile_rank_classes<scalar_t>(const PercentileRankParams<scalar_t>&, int64_t, \
                                                  int64_t);
MTS_FAST_INSTANTIATE(float)
MTS_FAST_INSTANTIATE(double)

}  // namespace mts_fast::cpu
