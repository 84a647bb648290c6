// neighbor_statistics on a GPU: a warp per row of the tile. Its lanes read 32 similarities at a
// time and vote which of them reach the last value of the list; lane 0 inserts these, a few per
// list and tile. Bytes moved: the tile once, and the columns of the row's class a second time.
#include "launch.h"
#include "neighbor_statistics.h"

namespace mts_fast::cuda {
namespace {

constexpr int kThreads = 256;

// Inserts into a descending list; equal values by ascending index. Without indices, `index` is
// null.
template <typename scalar_t>
__device__ void insert(scalar_t* list, int64_t* index, int64_t length, scalar_t value,
                       int64_t who) {
  int64_t place = length;
  while (place > 0 && (list[place - 1] < value ||
                       (index != nullptr && list[place - 1] == value && index[place - 1] > who))) {
    --place;
    if (place + 1 < length) {
      list[place + 1] = list[place];
      if (index != nullptr) index[place + 1] = index[place];
    }
  }
  if (place == length) return;
  list[place] = value;
  if (index != nullptr) index[place] = who;
}

// Merges columns [begin, end) of one row into one of its lists; all lanes of a warp call it
// together.
template <typename scalar_t>
__device__ void merge(const MergeParams<scalar_t>& params, const scalar_t* value, int64_t self,
                      int64_t begin, int64_t end, scalar_t* list, int64_t* index, int64_t length) {
  // 1. the last value of the list is the threshold
  const int lane = threadIdx.x % kWarp;
  scalar_t last = list[length - 1];
  for (int64_t first = begin; first < end; first += kWarp) {
    // 2. lanes vote which of 32 similarities reach it
    const int64_t j = first + lane;
    const scalar_t mine = j < end ? value[j] : scalar_t(0);
    const int64_t who = j < end ? params.column_sample[j] : self;
    unsigned votes = __ballot_sync(kAllLanes, j < end && who != self && mine >= last);
    if (votes == 0) continue;
    // 3. lane 0 inserts them, in ascending order of columns
    while (votes != 0) {
      const int source = __ffs(static_cast<int>(votes)) - 1;
      votes &= votes - 1;
      const scalar_t candidate = __shfl_sync(kAllLanes, mine, source);
      const int64_t candidate_who =
          static_cast<int64_t>(__shfl_sync(kAllLanes, static_cast<long long>(who), source));
      if (lane == 0) insert(list, index, length, candidate, candidate_who);
    }
    // 4. all lanes get the new threshold
    if (lane == 0) last = list[length - 1];
    last = __shfl_sync(kAllLanes, last, 0);
  }
}

template <typename scalar_t>
__global__ void merge_rows_kernel(MergeParams<scalar_t> params) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
  if (row >= params.rows) return;  // whole warps at once
  // 1. the row of this warp
  const NeighborLists<scalar_t>& lists = params.lists;
  const scalar_t* value = params.tile + row * params.columns;
  const int64_t self = params.row_sample[row];
  // 2. all columns into the pool list
  merge(params, value, self, 0, params.columns, lists.similarity + self * lists.neighbors,
        lists.index + self * lists.neighbors, lists.neighbors);
  // 3. columns of the row's class into the real and synthetic lists
  const int64_t* offset = params.column_offset + 2 * params.row_class[row];
  scalar_t* class_lists[] = {lists.real + self * lists.k, lists.synthetic + self * lists.k};
  for (int source = 0; source < 2; ++source) {
    const int64_t begin = offset[source] - params.first_column;
    const int64_t end = offset[source + 1] - params.first_column;
    merge<scalar_t>(params, value, self, begin < 0 ? 0 : begin,
                    end < params.columns ? end : params.columns,
                    source == 0 ? class_lists[0] : class_lists[1], nullptr, lists.k);
  }
}

}  // namespace

template <typename scalar_t>
cudaError_t merge_rows(const MergeParams<scalar_t>& params, cudaStream_t stream) {
  if (params.rows == 0) return cudaSuccess;
  MTS_FAST_LAUNCH(merge_rows_kernel<scalar_t>, ceil_divide(params.rows * kWarp, kThreads), kThreads,
                  stream, params);
  return cudaGetLastError();
}

template cudaError_t merge_rows<float>(const MergeParams<float>&, cudaStream_t);
template cudaError_t merge_rows<double>(const MergeParams<double>&, cudaStream_t);

}  // namespace mts_fast::cuda
