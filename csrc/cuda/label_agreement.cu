// label_agreement on a GPU: a thread per sample. K is a handful: the rows of a warp are close
// together, so that the cache makes up for strided reads. Bytes moved: similarities and neighbours
// once, a label per neighbour, and two results per sample.
#include <cmath>

#include "label_agreement.h"
#include "launch.h"

namespace mts_fast::cuda {
namespace {

constexpr int kThreads = 256;

template <typename scalar_t>
__global__ void label_agreement_kernel(LabelAgreementParams<scalar_t> params) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= params.num_samples) return;
  // 1. the row of this thread
  const int64_t k = params.num_neighbors;
  const int64_t* neighbor = params.neighbor + i * k;
  const scalar_t* similarity = params.similarity + i * k;
  // 2. sum over its neighbours, in double
  int64_t matches = 0;
  double matching = 0.0;
  double total = 0.0;
  bool inside = true;
  for (int64_t j = 0; j < k; ++j) {
    const bool known = neighbor[j] >= 0 && neighbor[j] < params.num_samples;
    const bool same = known && params.label[neighbor[j]] == params.label[i];
    inside = inside && known;
    matches += same;
    matching += same ? static_cast<double>(similarity[j]) : 0.0;
    total += static_cast<double>(similarity[j]);
  }
  // 3. shares of the neighbours with the same label; NaN where a neighbour is outside the pool
  const scalar_t share = static_cast<scalar_t>(static_cast<double>(matches) / k);
  params.plain[i] = inside ? share : static_cast<scalar_t>(NAN);
  params.weighted[i] = static_cast<scalar_t>(inside ? matching / (total + params.epsilon) : NAN);
}

}  // namespace

template <typename scalar_t>
cudaError_t label_agreement(const LabelAgreementParams<scalar_t>& params, cudaStream_t stream) {
  if (params.num_samples == 0) return cudaSuccess;
  MTS_FAST_LAUNCH(label_agreement_kernel<scalar_t>, ceil_divide(params.num_samples, kThreads),
                  kThreads, stream, params);
  return cudaGetLastError();
}

template cudaError_t label_agreement<float>(const LabelAgreementParams<float>&, cudaStream_t);
template cudaError_t label_agreement<double>(const LabelAgreementParams<double>&, cudaStream_t);

}  // namespace mts_fast::cuda
