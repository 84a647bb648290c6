// The launchers of csrc/cuda on the emulator, as C functions for ctypes.
#include "../../csrc/cuda/class_centroids.h"
#include "../../csrc/cuda/label_agreement.h"
#include "../../csrc/cuda/neighbor_statistics.h"

using namespace mts_fast::cuda;

#define FOR_BOTH(scalar_t, suffix)                                                                 \
  void label_agreement_##suffix(const scalar_t* similarity, const int64_t* neighbor,               \
                                const int64_t* label, scalar_t* plain, scalar_t* weighted,         \
                                int64_t n, int64_t k, double epsilon) {                            \
    label_agreement<scalar_t>({similarity, neighbor, label, plain, weighted, n, k, epsilon},       \
                              nullptr);                                                            \
  }                                                                                                \
  void sum_groups_##suffix(const scalar_t* embedding, const int64_t* order, const int64_t* offset, \
                           double* sum, int64_t groups, int64_t dimension) {                       \
    class_centroids<scalar_t>({embedding, order, offset, sum, groups, dimension}, nullptr);        \
  }                                                                                                \
  void merge_neighbors_##suffix(                                                                   \
      const scalar_t* tile, const int64_t* row_sample, const int64_t* row_class,                   \
      const int64_t* column_sample, const int64_t* column_offset, int64_t first_column,            \
      scalar_t* similarity, int64_t* index, scalar_t* real, scalar_t* synthetic, int64_t rows,     \
      int64_t columns, int64_t neighbors, int64_t k) {                                             \
    merge_rows<scalar_t>({tile,                                                                    \
                          row_sample,                                                              \
                          column_sample,                                                           \
                          row_class,                                                               \
                          column_offset,                                                           \
                          {similarity, index, real, synthetic, neighbors, k},                      \
                          rows,                                                                    \
                          columns,                                                                 \
                          first_column},                                                           \
                         nullptr);                                                                 \
  }

extern "C" {
FOR_BOTH(float, float32)
FOR_BOTH(double, float64)

void set_seed(unsigned seed) { emulator::seed = seed; }
}
