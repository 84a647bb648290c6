// neighbor_statistics on the CPU: a tile of similarities is computed, then merged into the lists.
#include "neighbor_statistics.h"

#include <algorithm>

namespace mts_fast::cpu {
namespace {

enum List { kPool = 0, kReal = 1, kSynthetic = 2 };

template <typename scalar_t>
scalar_t* class_list(const NeighborLists<scalar_t>& lists, int list) {
  return list == kReal ? lists.real : lists.synthetic;
}

// Inserts into a descending list without indices; returns its last value.
template <typename scalar_t>
scalar_t insert(scalar_t* list, int64_t length, scalar_t value) {
  int64_t place = length - 1;
  if (!(value > list[place])) return list[place];
  for (; place > 0 && list[place - 1] < value; --place) list[place] = list[place - 1];
  list[place] = value;
  return list[length - 1];
}

// The same with indices: equal similarities are ordered by ascending index.
template <typename scalar_t>
scalar_t insert(scalar_t* list, int64_t* index, int64_t length, scalar_t value, int64_t who) {
  const auto before = [&](int64_t place) {
    return list[place] < value || (list[place] == value && index[place] > who);
  };
  int64_t place = length - 1;
  if (!before(place)) return list[place];
  for (; place > 0 && before(place - 1); --place) {
    list[place] = list[place - 1];
    index[place] = index[place - 1];
  }
  list[place] = value;
  index[place] = who;
  return list[length - 1];
}

// Offers sample `other` (a row of the lists) with similarity `value` to one list of the sample at
// `place`, and updates its threshold.
template <typename scalar_t>
void offer(const NeighborStatisticsParams<scalar_t>& params, const NeighborChunk<scalar_t>& chunk,
           int64_t place, int list, scalar_t value, int64_t other) {
  scalar_t& threshold = chunk.thresholds[list * chunk.num_samples + place];
  if (!(value >= threshold)) return;
  const NeighborLists<scalar_t>& lists = params.lists;
  const int64_t row = chunk.start + chunk.order[place];
  if (list == kPool) {
    threshold = insert(lists.similarity + row * lists.neighbors,
                       lists.index + row * lists.neighbors, lists.neighbors, value, other);
  } else {
    threshold = insert(class_list(lists, list) + row * lists.k, lists.k, value);
  }
}

// Merges one row's similarities to columns [begin, end) into `row_list` of the row and
// `column_list` of each column; value[j] is that of column j.
template <typename scalar_t>
void merge_row(const NeighborStatisticsParams<scalar_t>& params, int64_t row, int row_list,
               int column_list, const scalar_t* value, int64_t begin, int64_t end) {
  const NeighborChunk<scalar_t>& rows = params.rows;
  const NeighborChunk<scalar_t>& columns = params.columns;
  const scalar_t* column_thresholds = columns.thresholds + column_list * columns.num_samples;
  const scalar_t& row_threshold = rows.thresholds[row_list * rows.num_samples + row];
  const int64_t row_sample = rows.start + rows.order[row];
  int64_t j = begin;
  // 1. search for the next block with a similarity that reaches a threshold
  while ((j = params.kernel->find(value, column_thresholds, row_threshold, j, end)) < end) {
    // 2. offer its entries to both lists
    const int64_t block_end = std::min(j + kSearchBlock, end);
    for (; j < block_end; ++j) {
      offer(params, rows, row, row_list, value[j], columns.start + columns.order[j]);
      offer(params, columns, j, column_list, value[j], row_sample);
    }
  }
}

struct Range {
  int64_t begin;
  int64_t end;
};

// Merges all pairs of a tile of computed similarities.
template <typename scalar_t>
void merge_tile(const NeighborStatisticsParams<scalar_t>& params, Range rows, Range columns,
                bool diagonal, const scalar_t* similarity) {
  // the (class, source) group of row i: 2 class + (0 real, 1 synthetic)
  const int64_t* offsets = params.rows.offsets;
  int64_t segment =
      std::upper_bound(offsets, offsets + 2 * params.num_classes + 1, rows.begin) - offsets - 1;
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    while (offsets[segment + 1] <= i) ++segment;
    // 1. all columns into the pool lists; value is indexed by the column's place, as thresholds are
    const scalar_t* value = similarity + (i - rows.begin) * params.tile - columns.begin;
    const int64_t first = diagonal ? i + 1 : columns.begin;
    merge_row(params, i, kPool, kPool, value, first, columns.end);
    // 2. columns of the row's class into the real and synthetic lists
    const int row_source_list = segment % 2 == 0 ? kReal : kSynthetic;
    for (const int list : {kReal, kSynthetic}) {
      const int64_t* range = params.columns.offsets + (segment - segment % 2) + (list - kReal);
      const int64_t begin = std::max(first, range[0]);
      const int64_t end = std::min(columns.end, range[1]);
      if (begin < end) merge_row(params, i, list, row_source_list, value, begin, end);
    }
  }
}

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Tile number t of the upper triangle of n x n tiles, diagonal by diagonal: pairs within a class
// come first and tighten the thresholds, and consecutive tiles have different rows and columns.
void triangle_tile(int64_t n, int64_t t, int64_t& i, int64_t& j) {
  int64_t diagonal = 0;
  while (t >= n - diagonal) t -= n - diagonal++;
  i = t;
  j = t + diagonal;
}

}  // namespace

template <typename scalar_t>
int64_t num_tiles(const NeighborStatisticsParams<scalar_t>& params) {
  const int64_t rows = ceil_divide(params.rows.num_samples, params.tile);
  const int64_t columns = ceil_divide(params.columns.num_samples, params.tile);
  return params.same ? rows * (rows + 1) / 2 : rows * columns;
}

template <typename scalar_t>
void load_thresholds(const NeighborChunk<scalar_t>& chunk, const NeighborLists<scalar_t>& lists) {
  for (int64_t place = 0; place < chunk.num_samples; ++place) {
    const int64_t row = chunk.start + chunk.order[place];
    scalar_t* threshold = chunk.thresholds + place;
    threshold[0] = lists.similarity[(row + 1) * lists.neighbors - 1];
    threshold[chunk.num_samples] = lists.real[(row + 1) * lists.k - 1];
    threshold[2 * chunk.num_samples] = lists.synthetic[(row + 1) * lists.k - 1];
  }
}

template <typename scalar_t>
void sweep_tiles(const NeighborStatisticsParams<scalar_t>& params, std::atomic<int64_t>& next,
                 scalar_t* similarity) {
  const NeighborChunk<scalar_t>& rows = params.rows;
  const NeighborChunk<scalar_t>& columns = params.columns;
  const int64_t panel = params.kernel->panel_rows;
  const int64_t total = num_tiles(params);
  const int64_t column_tiles = ceil_divide(columns.num_samples, params.tile);
  for (int64_t t = next.fetch_add(1); t < total; t = next.fetch_add(1)) {
    int64_t i = t / column_tiles;
    int64_t j = t % column_tiles;
    if (params.same) triangle_tile(column_tiles, t, i, j);
    const bool diagonal = params.same && i == j;
    // 1. the row and column ranges of tile t
    const Range row{i * params.tile, std::min((i + 1) * params.tile, rows.num_samples)};
    const Range column{j * params.tile, std::min((j + 1) * params.tile, columns.num_samples)};
    // 2. its similarities
    params.kernel->multiply(
        rows.packed + row.begin * params.depth, columns.packed + column.begin * params.depth,
        params.depth, ceil_divide(row.end - row.begin, panel),
        ceil_divide(column.end - column.begin, panel), diagonal, similarity, params.tile);
    // 3. merge them into the lists. Locks are taken rows before columns, and within one chunk in
    // the order i < j, so that threads cannot deadlock.
    const std::lock_guard<std::mutex> row_lists(rows.locks[i]);
    if (diagonal) {
      merge_tile(params, row, column, true, similarity);
    } else {
      const std::lock_guard<std::mutex> column_lists(columns.locks[j]);
      merge_tile(params, row, column, false, similarity);
    }
  }
}

#define MTS_FAST_INSTANTIATE(scalar_t)                                             \
  template int64_t num_tiles<scalar_t>(const NeighborStatisticsParams<scalar_t>&); \
  template void load_thresholds<scalar_t>(const NeighborChunk<scalar_t>&,          \
                                          const NeighborLists<scalar_t>&);         \
  template void sweep_tiles<scalar_t>(const NeighborStatisticsParams<scalar_t>&,   \
                                      std::atomic<int64_t>&, scalar_t*);
MTS_FAST_INSTANTIATE(float)
MTS_FAST_INSTANTIATE(double)

}  // namespace mts_fast::cpu
