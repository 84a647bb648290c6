// class_centroids on a GPU: a thread per group and column loops over the group's samples;
// neighbouring threads read neighbouring columns. Bytes moved: the embeddings, once.
#include "class_centroids.h"
#include "launch.h"

namespace mts_fast::cuda {
namespace {

constexpr int kThreads = 128;

template <typename scalar_t>
__global__ void class_centroids_kernel(ClassCentroidsParams<scalar_t> params) {
  // 1. the group and column of this thread
  const int64_t entry = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t group = entry / params.dimension;
  const int64_t d = entry % params.dimension;
  if (group >= params.num_groups) return;
  // 2. add the group's samples in order, in double
  double sum = params.sum[entry];
  for (int64_t i = params.offset[group]; i < params.offset[group + 1]; ++i) {
    sum += static_cast<double>(params.embedding[params.order[i] * params.dimension + d]);
  }
  // 3. store
  params.sum[entry] = sum;
}

}  // namespace

template <typename scalar_t>
cudaError_t class_centroids(const ClassCentroidsParams<scalar_t>& params, cudaStream_t stream) {
  const int64_t entries = params.num_groups * params.dimension;
  if (entries == 0) return cudaSuccess;
  MTS_FAST_LAUNCH(class_centroids_kernel<scalar_t>, ceil_divide(entries, kThreads), kThreads,
                  stream, params);
  return cudaGetLastError();
}

template cudaError_t class_centroids<float>(const ClassCentroidsParams<float>&, cudaStream_t);
template cudaError_t class_centroids<double>(const ClassCentroidsParams<double>&, cudaStream_t);

}  // namespace mts_fast::cuda
