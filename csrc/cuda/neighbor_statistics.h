// neighbor_statistics on a GPU: what of a tile of similarities, made by cuBLAS, enters a list.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../common/neighbor_lists.h"

namespace mts_fast::cuda {

// Rows and columns of the tile are places of two chunks, sorted by class, real before synthetic.
template <typename scalar_t>
struct MergeParams {
  const scalar_t* tile;          // [rows, columns], contiguous
  const int64_t* row_sample;     // [rows], which rows of the lists they are
  const int64_t* column_sample;  // [columns]
  const int64_t* row_class;      // [rows]
  const int64_t* column_offset;  // [2 C + 1], first place in their chunk of the columns of class
                                 // 0 real, 0 synthetic, 1 real, ...
  NeighborLists<scalar_t> lists;
  int64_t rows;
  int64_t columns;
  int64_t first_column;  // place in their chunk of the tile's first column
};

// Offers every column to the lists of every row but its own. No two rows share a list, so the
// result depends neither on the grid nor on the order of tiles.
template <typename scalar_t>
cudaError_t merge_rows(const MergeParams<scalar_t>& params, cudaStream_t stream);

}  // namespace mts_fast::cuda
