// Every sample's gradients of a norm's weight and bias on the CPU, without the normalised input.
#pragma once

#include <cstdint>

namespace mts_fast::cpu {

// x and b are [samples, positions, channels], contiguous; b is the gradient at the norm's output.
template <typename scalar_t>
struct LayerNormParams {
  const scalar_t* x;
  const scalar_t* b;
  scalar_t* weight;  // out [samples, channels]
  scalar_t* bias;    // out [samples, channels]; null: not asked for
  int64_t positions;
  int64_t channels;
  double eps;
  bool centered;  // layer norm; else RMS norm
};

// x and b are [samples, channels, positions], contiguous.
template <typename scalar_t>
struct GroupNormParams {
  const scalar_t* x;
  const scalar_t* b;
  const scalar_t* mean;      // [channels] of batch norm; null: each group's own statistics
  const scalar_t* variance;  // [channels], or null as mean
  scalar_t* weight;          // out [samples, channels]
  scalar_t* bias;            // out [samples, channels]
  int64_t group_channels;    // channels of a group; 1 where mean is passed
  int64_t groups;
  int64_t positions;
  double eps;
};

// Sums of the layer norm in progress, [2, channels] each: of a block of rows, and of all before it.
template <typename scalar_t>
struct LayerNormSums {
  scalar_t* block;
  double* total;
};

// For samples [begin, end), with x^ = (x - mean_t) / sqrt(variance_t + eps) over the channels of
// position t (RMS norm: mean_t = 0):
//   weight[i, c] = sum_t x^_itc b_itc
//   bias[i, c]   = sum_t b_itc
void layer_norm_sample_gradients(const LayerNormParams<float>& params,
                                 const LayerNormSums<float>& sums, int64_t begin, int64_t end);
void layer_norm_sample_gradients(const LayerNormParams<double>& params,
                                 const LayerNormSums<double>& sums, int64_t begin, int64_t end);

// For groups [begin, end) of the samples groups in all, with x^ normalised over the channels and
// positions of a group: the same sums over the positions.
void group_norm_sample_gradients(const GroupNormParams<float>& params, int64_t begin, int64_t end);
void group_norm_sample_gradients(const GroupNormParams<double>& params, int64_t begin, int64_t end);

}  // namespace mts_fast::cpu
