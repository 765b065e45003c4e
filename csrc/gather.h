// What the kernels of gather_blocks are given, on a CPU and on CUDA alike: raw pointers, nothing
// known of torch. Strides and runs are counted in elements.
#pragma once

#include <cstdint>

namespace hgc {

enum class Element : int { kFloat, kHalf, kBFloat, kE4m3 };

// cat(hidden, skip + scale * residual) over inputs whose samples are dense in one and the same
// order. In NCHW order a sample is one run of C * H * W elements; in channels_last order it is
// H * W runs of C elements.
struct GatherDense {
  const void* hidden_ptr;
  const void* skip_ptr;
  const void* residual_ptr;  // may be null
  void* out_ptr;             // dense
  int64_t samples;
  int64_t runs_per_sample;
  int64_t hidden_run;
  int64_t skip_run;
  int64_t hidden_stride;  // from sample to sample
  int64_t skip_stride;
  int64_t residual_stride;
  float scale;
};

// The same over inputs of any strides.
struct GatherStrided {
  const void* hidden_ptr;
  const void* skip_ptr;
  const void* residual_ptr;
  void* out_ptr;
  int64_t samples, hidden_channels, skip_channels, height, width;
  int64_t hidden_strides[4], skip_strides[4], residual_strides[4], out_strides[4];
  float scale;
};

}  // namespace hgc
