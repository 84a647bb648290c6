// neighbor_statistics on a GPU: merges a tile of similarities, computed by cuBLAS, into the lists.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../common/neighbor_lists.h"

namespace mts_fast::cuda {

// Rows and columns of the tile are samples of two chunks, sorted by class, real before synthetic; a
// place is a position in that order.
template <typename scalar_t>
struct MergeParams {
  const scalar_t* tile;          // [rows, columns], contiguous
  const int64_t* row_sample;     // [rows], their rows of the lists
  const int64_t* column_sample;  // [columns]
  const int64_t* row_class;      // [rows]
  const int64_t* column_offset;  // [2 C + 1], first place in the column chunk of class 0 real,
                                 // 0 synthetic, 1 real, ...
  NeighborLists<scalar_t> lists;
  int64_t rows;
  int64_t columns;
  int64_t first_column;  // place in the column chunk of the tile's first column
};

// Merges every column into the lists of every row of another sample. No two rows share a list, so
// that the result depends neither on the grid nor on the order of tiles.
template <typename scalar_t>
cudaError_t merge_rows(const MergeParams<scalar_t>& params, cudaStream_t stream);

}  // namespace mts_fast::cuda
