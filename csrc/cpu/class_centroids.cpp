// class_centroids on the CPU: one pass over the embeddings, no float64 copy of them.
#include "class_centroids.h"

namespace mts_fast::cpu {

template <typename scalar_t>
void class_centroids_columns(const ClassCentroidsParams<scalar_t>& params, int64_t begin,
                             int64_t end) {
  for (int64_t i = 0; i < params.num_samples; ++i) {
    // 1. the sum of the sample's class and source
    const int64_t group = params.label[i] + (params.is_synthetic[i] ? params.num_classes : 0);
    const scalar_t* row = params.embedding + i * params.dimension;
    double* sum = params.sum + group * params.dimension;
    // 2. add its columns, in double
    for (int64_t d = begin; d < end; ++d) sum[d] += static_cast<double>(row[d]);
  }
}

template void class_centroids_columns<float>(const ClassCentroidsParams<float>&, int64_t, int64_t);
template void class_centroids_columns<double>(const ClassCentroidsParams<double>&, int64_t,
                                              int64_t);

}  // namespace mts_fast::cpu
