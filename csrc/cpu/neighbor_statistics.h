// neighbor_statistics on the CPU: the similarity of every pair of two chunks of a pool is computed
// once, and merged into the lists of both samples.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>

#include "../common/neighbor_lists.h"
#include "similarity_tile.h"

namespace mts_fast::cpu {

// Samples are sorted by class, real before synthetic; a place is a position in that order. The
// candidates of a class's lists are then adjacent, and no labels are needed.
template <typename scalar_t>
struct NeighborChunk {
  const scalar_t* packed;  // [panels, depth, panel_rows], unit rows by place
  const int64_t* order;    // [num_samples], place -> sample of the chunk
  const int64_t* offsets;  // [2 * num_classes + 1], first place of class 0 real, 0 synthetic, 1 ...
  scalar_t* thresholds;    // [3, num_samples], by place: the last value of each of its lists
  std::mutex* locks;       // [tiles], each guards the lists of the places of a tile
  int64_t num_samples;
  int64_t start;  // the chunk's first sample is this row of the lists
};

template <typename scalar_t>
struct NeighborStatisticsParams {
  NeighborChunk<scalar_t> rows;
  NeighborChunk<scalar_t> columns;  // the same as rows for the pairs within one chunk
  NeighborLists<scalar_t> lists;
  const TileKernel<scalar_t>* kernel;
  int64_t num_classes;
  int64_t depth;  // D
  int64_t tile;   // rows and columns of a tile, a multiple of kernel->panel_rows
  bool same;      // rows and columns are one chunk: only pairs i < j
};

template <typename scalar_t>
int64_t num_tiles(const NeighborStatisticsParams<scalar_t>& params);

// Fills `thresholds` of one chunk from the lists.
template <typename scalar_t>
void load_thresholds(const NeighborChunk<scalar_t>& chunk, const NeighborLists<scalar_t>& lists);

// Takes tiles from the counter `next` until none is left; any number of threads may run it at
// once. The lists depend neither on the number of threads nor on the tiles: the order of a list is
// unique, and a similarity does not depend on its position in a tile. `similarity` is a buffer for
// tile x tile entries.
template <typename scalar_t>
void sweep_tiles(const NeighborStatisticsParams<scalar_t>& params, std::atomic<int64_t>& next,
                 scalar_t* similarity);

}  // namespace mts_fast::cpu
