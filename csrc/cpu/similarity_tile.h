// Tiles of similarities: inner products of packed rows, at the speed of a BLAS, and the search in
// them for entries that reach a threshold. One implementation per instruction set.
#pragma once

#include <cstdint>

#include "../common/isa.h"

namespace mts_fast::cpu {

// Rows are packed in panels [panels, depth, panel_rows], the last one padded with zeros. Both
// operands of a product have this layout, so a pool is packed once.
template <typename scalar_t>
struct TileKernel {
  int64_t panel_rows;

  // out[i * stride + j] = <row i of a, row j of b> for panels_a x panels_b panels. On the diagonal
  // (a == b) panels left of it are skipped. Every entry is summed in the same order, whatever its
  // position in a tile: by runs of kDepthBlock fused multiply-adds, then over the runs.
  void (*multiply)(const scalar_t* a, const scalar_t* b, int64_t depth, int64_t panels_a,
                   int64_t panels_b, bool diagonal, scalar_t* out, int64_t stride);

  // First j in [begin, end), up to rounding down by less than kSearchBlock, where value[j] >=
  // threshold or value[j] >= thresholds[j]; end where there is none.
  int64_t (*find)(const scalar_t* value, const scalar_t* thresholds, scalar_t threshold,
                  int64_t begin, int64_t end);
};

// terms of a panel that stay in the first-level cache: 128 x 48 floats are 24 KiB.
inline constexpr int64_t kDepthBlock = 128;
inline constexpr int64_t kSearchBlock = 32;

template <typename scalar_t>
const TileKernel<scalar_t>& tile_kernel(Isa isa);

// Copies row `source[r]` of rows [.., depth] to row r of one panel for r in [0, count), and pads
// the panel with zeros.
template <typename scalar_t>
void pack_panel(const scalar_t* rows, int64_t row_stride, const int64_t* source, int64_t count,
                int64_t depth, int64_t panel_rows, scalar_t* panel);

}  // namespace mts_fast::cpu
