// The lists that neighbor_statistics fills, on the CPU and on a GPU.
#pragma once

#include <cstdint>

namespace mts_fast {

// Running lists of the whole pool, descending; equal similarities by ascending index.
template <typename scalar_t>
struct NeighborLists {
  scalar_t* similarity;  // [N, neighbors], to the nearest samples of the pool
  int64_t* index;        // [N, neighbors], the indices of these samples
  scalar_t* real;        // [N, k], to the nearest real samples of the class
  scalar_t* synthetic;   // [N, k], to the nearest synthetic ones
  int64_t neighbors;
  int64_t k;
};

}  // namespace mts_fast
