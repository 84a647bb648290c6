// neighbor_statistics: torch's stable ABI on one side, the plain C++ kernel on the other.
#include "../../cpu/neighbor_statistics.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <vector>

#include "../tensor.h"

namespace mts_fast {
namespace {

// three tiles' worth of data stay in a second-level cache of 512 KiB.
constexpr int64_t kDefaultTile = 192;

int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// A chunk and the memory that it points to: packed rows, thresholds and locks.
template <typename scalar_t>
class ChunkStorage {
 public:
  ChunkStorage(const Tensor& unit, const Tensor& order, const Tensor& offsets, int64_t start,
               int64_t tile, const NeighborLists<scalar_t>& lists,
               const cpu::TileKernel<scalar_t>& kernel)
      : packed_(torch::stable::new_empty(
            unit, {round_up(unit.size(0), kernel.panel_rows), unit.size(1)})),
        thresholds_(torch::stable::new_empty(unit, {3, unit.size(0)})),
        locks_(round_up(unit.size(0), tile) / tile) {
    chunk.packed = data<const scalar_t>(packed_);
    chunk.order = data<const int64_t>(order);
    chunk.offsets = data<const int64_t>(offsets);
    chunk.thresholds = data<scalar_t>(thresholds_);
    chunk.locks = locks_.data();
    chunk.num_samples = unit.size(0);
    chunk.start = start;
    cpu::load_thresholds(chunk, lists);
    pack(unit, kernel.panel_rows);
  }

  cpu::NeighborChunk<scalar_t> chunk;

 private:
  void pack(const Tensor& unit, int64_t panel_rows) {
    const scalar_t* rows = data<const scalar_t>(unit);
    scalar_t* packed = data<scalar_t>(packed_);
    const int64_t depth = unit.size(1);
    const int64_t panels = round_up(chunk.num_samples, panel_rows) / panel_rows;
    torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        const int64_t count = std::min(panel_rows, chunk.num_samples - p * panel_rows);
        cpu::pack_panel(rows, depth, chunk.order + p * panel_rows, count, depth, panel_rows,
                        packed + p * panel_rows * depth);
      }
    });
  }

  Tensor packed_;
  Tensor thresholds_;
  std::vector<std::mutex> locks_;
};

template <typename scalar_t>
void run(const Tensor& rows, const Tensor& row_order, const Tensor& row_offsets, int64_t row_start,
         const Tensor& columns, const Tensor& column_order, const Tensor& column_offsets,
         int64_t column_start, Tensor& similarity, Tensor& index, Tensor& real, Tensor& synthetic,
         int64_t tile) {
  const cpu::TileKernel<scalar_t>& kernel = cpu::tile_kernel<scalar_t>(isa());
  cpu::NeighborStatisticsParams<scalar_t> params;
  params.kernel = &kernel;
  params.tile = round_up(tile > 0 ? tile : kDefaultTile, kernel.panel_rows);
  params.depth = rows.size(1);
  params.num_classes = (row_offsets.size(0) - 1) / 2;
  params.same = row_start == column_start;
  params.lists = {data<scalar_t>(similarity), data<int64_t>(index), data<scalar_t>(real),
                  data<scalar_t>(synthetic),  similarity.size(1),   real.size(1)};
  ChunkStorage<scalar_t> row_chunk(rows, row_order, row_offsets, row_start, params.tile,
                                   params.lists, kernel);
  params.rows = row_chunk.chunk;
  std::vector<ChunkStorage<scalar_t>> column_chunk;  // empty where rows and columns are one chunk
  if (!params.same) {
    column_chunk.emplace_back(columns, column_order, column_offsets, column_start, params.tile,
                              params.lists, kernel);
  }
  params.columns = params.same ? params.rows : column_chunk.front().chunk;

  const int64_t threads =
      std::min<int64_t>(torch::stable::get_num_threads(), cpu::num_tiles(params));
  Tensor tiles = torch::stable::new_empty(rows, {threads, params.tile, params.tile});
  scalar_t* buffers = data<scalar_t>(tiles);
  std::atomic<int64_t> next{0};
  // one call per thread; each takes tiles from `next` until none is left.
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t) {
    cpu::sweep_tiles(params, next, buffers + begin * params.tile * params.tile);
  });
}

void neighbor_statistics_(const Tensor& rows, const Tensor& row_order, const Tensor& row_offsets,
                          int64_t row_start, const Tensor& columns, const Tensor& column_order,
                          const Tensor& column_offsets, int64_t column_start, Tensor similarity,
                          Tensor index, Tensor real, Tensor synthetic, int64_t tile) {
  // the Python op has checked shapes, dtypes and that the lists are contiguous.
  const Tensor rows_c = torch::stable::contiguous(rows);
  const Tensor columns_c = torch::stable::contiguous(columns);
  with_scalar_type(rows, [&]<typename scalar_t>() {
    run<scalar_t>(rows_c, row_order, row_offsets, row_start, columns_c, column_order,
                  column_offsets, column_start, similarity, index, real, synthetic, tile);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mts_fast, CPU, m) {
  m.impl("neighbor_statistics_", TORCH_BOX(&neighbor_statistics_));
}

}  // namespace mts_fast
