// Tiles of similarities. The micro-kernel keeps rows x 3 vectors of sums in registers: 8 x 3 of the
// 32 registers of AVX-512, 4 x 3 of the 16 of AVX2 and SSE. In cache 114 GFLOP/s on one core of an
// AMD EPYC 9004 (November 2026), where torch's matmul gave 78 and faiss's search 101.
#include "similarity_tile.h"

#include <algorithm>

#include "targets.h"

namespace mts_fast::cpu {
namespace {

constexpr int kVectors = 3;

template <typename scalar_t, int kLanes>
struct VectorOf {
  typedef scalar_t type __attribute__((vector_size(kLanes * sizeof(scalar_t)), may_alias));
};

// One block of kRows rows x 3 vectors of columns over `depth` terms: out = sum_k a_k b_k^T where
// `first`, else out += it.
template <typename scalar_t, int kLanes, int kRows>
MTS_FAST_INLINE void multiply_block(const scalar_t* a, const scalar_t* b, int64_t depth, bool first,
                                    scalar_t* out, int64_t stride) {
  using Vector = typename VectorOf<scalar_t, kLanes>::type;
  constexpr int kPanel = kVectors * kLanes;
  // 1. sums in registers
  Vector sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) sum[r][v] = Vector{};
  }
  // 2. one outer product per term
  for (int64_t k = 0; k < depth; ++k) {
    Vector column[kVectors];
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) {
      column[v] = *reinterpret_cast<const Vector*>(b + k * kPanel + v * kLanes);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vector row = a[k * kPanel + r] - Vector{};  // the same value in every lane
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) sum[r][v] += row * column[v];
    }
  }
  // 3. store
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) {
      Vector* entries = reinterpret_cast<Vector*>(out + r * stride + v * kLanes);
      *entries = first ? sum[r][v] : *entries + sum[r][v];
    }
  }
}

// TileKernel::multiply: runs of kDepthBlock terms outermost, then panels of b, which stay in the
// first-level cache, then panels of a.
template <typename scalar_t, int kLanes, int kRows>
MTS_FAST_INLINE void multiply_tile(const scalar_t* a, const scalar_t* b, int64_t depth,
                                   int64_t panels_a, int64_t panels_b, bool diagonal, scalar_t* out,
                                   int64_t stride) {
  constexpr int64_t kPanel = kVectors * kLanes;
  static_assert(kPanel % kRows == 0);
  for (int64_t k = 0; k < depth; k += kDepthBlock) {
    const int64_t run = std::min(kDepthBlock, depth - k);
    for (int64_t j = 0; j < panels_b; ++j) {
      const int64_t rows_end = diagonal ? j + 1 : panels_a;
      for (int64_t i = 0; i < rows_end; ++i) {
        for (int64_t r = 0; r < kPanel; r += kRows) {
          multiply_block<scalar_t, kLanes, kRows>(
              a + (i * depth + k) * kPanel + r, b + (j * depth + k) * kPanel, run, k == 0,
              out + (i * kPanel + r) * stride + j * kPanel, stride);
        }
      }
    }
  }
}

// TileKernel::find: whole blocks of kSearchBlock without a branch, then the rest one by one.
template <typename scalar_t>
MTS_FAST_INLINE int64_t find_reaching(const scalar_t* value, const scalar_t* thresholds,
                                      scalar_t threshold, int64_t begin, int64_t end) {
  int64_t j = begin;
  for (; j + kSearchBlock <= end; j += kSearchBlock) {
    int hits = 0;
    for (int64_t l = 0; l < kSearchBlock; ++l) {
      hits |= (value[j + l] >= threshold) | (value[j + l] >= thresholds[j + l]);
    }
    if (hits) return j;
  }
  for (; j < end; ++j) {
    if (value[j] >= threshold || value[j] >= thresholds[j]) return j;
  }
  return end;
}

// The two functions for one instruction set. A macro, as the attribute cannot be a parameter.
#define MTS_FAST_TILE_FUNCTIONS(name, attribute, scalar_t, lanes, rows)                            \
  attribute void multiply_##name(const scalar_t* a, const scalar_t* b, int64_t depth,              \
                                 int64_t panels_a, int64_t panels_b, bool diagonal, scalar_t* out, \
                                 int64_t stride) {                                                 \
    multiply_tile<scalar_t, lanes, rows>(a, b, depth, panels_a, panels_b, diagonal, out, stride);  \
  }                                                                                                \
  attribute int64_t find_##name(const scalar_t* value, const scalar_t* thresholds,                 \
                                scalar_t threshold, int64_t begin, int64_t end) {                  \
    return find_reaching(value, thresholds, threshold, begin, end);                                \
  }                                                                                                \
  constexpr TileKernel<scalar_t> kernel_##name{kVectors * lanes, multiply_##name, find_##name};

MTS_FAST_TILE_FUNCTIONS(baseline_float, , float, 4, 4)
MTS_FAST_TILE_FUNCTIONS(baseline_double, , double, 2, 3)
#if defined(__x86_64__)
MTS_FAST_TILE_FUNCTIONS(avx2_float, MTS_FAST_AVX2, float, 8, 4)
MTS_FAST_TILE_FUNCTIONS(avx2_double, MTS_FAST_AVX2, double, 4, 4)
MTS_FAST_TILE_FUNCTIONS(avx512_float, MTS_FAST_AVX512, float, 16, 8)
MTS_FAST_TILE_FUNCTIONS(avx512_double, MTS_FAST_AVX512, double, 8, 8)
#endif

}  // namespace

#if defined(__x86_64__)
template <>
const TileKernel<float>& tile_kernel(Isa isa) {
  if (isa == Isa::avx512) return kernel_avx512_float;
  return isa == Isa::avx2 ? kernel_avx2_float : kernel_baseline_float;
}

template <>
const TileKernel<double>& tile_kernel(Isa isa) {
  if (isa == Isa::avx512) return kernel_avx512_double;
  return isa == Isa::avx2 ? kernel_avx2_double : kernel_baseline_double;
}
#else
template <>
const TileKernel<float>& tile_kernel(Isa) {
  return kernel_baseline_float;
}

template <>
const TileKernel<double>& tile_kernel(Isa) {
  return kernel_baseline_double;
}
#endif

template <typename scalar_t>
void pack_panel(const scalar_t* rows, int64_t row_stride, const int64_t* source, int64_t count,
                int64_t depth, int64_t panel_rows, scalar_t* panel) {
  // 16 columns at a time: a cache line of each row is read whole, and the lines written stay in
  // cache.
  constexpr int64_t kColumns = 16;
  for (int64_t k = 0; k < depth; k += kColumns) {
    const int64_t end = std::min(k + kColumns, depth);
    for (int64_t r = 0; r < panel_rows; ++r) {
      const scalar_t* row = r < count ? rows + source[r] * row_stride : nullptr;
      for (int64_t d = k; d < end; ++d) panel[d * panel_rows + r] = row ? row[d] : scalar_t(0);
    }
  }
}

template void pack_panel<float>(const float*, int64_t, const int64_t*, int64_t, int64_t, int64_t,
                                float*);
template void pack_panel<double>(const double*, int64_t, const int64_t*, int64_t, int64_t, int64_t,
                                 double*);

}  // namespace mts_fast::cpu
