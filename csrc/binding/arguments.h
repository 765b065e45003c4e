// What the CPU and the CUDA binding both need to know of their arguments. The public Python
// functions have checked them already; a direct call of torch.ops.hgc has not, so whatever a
// kernel's memory accesses rely on is checked here again.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <cstdint>
#include <optional>

namespace hgc {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool is_float_type(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16;
}

// Whether the samples of a [B, C, H, W] tensor are dense in NCHW order; the batch stride is free.
inline bool is_dense_nchw(const Tensor& x) {
  return (x.size(3) == 1 || x.stride(3) == 1) && (x.size(2) == 1 || x.stride(2) == x.size(3)) &&
         (x.size(1) == 1 || x.stride(1) == x.size(2) * x.size(3));
}

// As hgc_kernels.layout.is_channels_last: the fake must come to the same strides.
inline bool is_channels_last(const Tensor& x) {
  if (x.size(1) == 1 || x.size(2) * x.size(3) == 1) return false;
  return x.stride(1) == 1 && (x.size(3) == 1 || x.stride(3) == x.size(1)) &&
         (x.size(2) == 1 || x.stride(2) == x.size(1) * x.size(3));
}

// Samples in channels_last order, which one of a single channel is as well.
inline bool is_dense_channels_last(const Tensor& x) {
  return (x.size(1) == 1 || x.stride(1) == 1) && (x.size(3) == 1 || x.stride(3) == x.size(1)) &&
         (x.size(2) == 1 || x.stride(2) == x.size(1) * x.size(3));
}

struct Gather {
  int64_t batch, hidden_channels, skip_channels, height, width;
  bool channels_last;  // the order of the result
  bool dense;          // every input has it too

  Gather(const Tensor& hidden, const Tensor& skip, const std::optional<Tensor>& residual,
         const std::optional<Tensor>& rows) {
    STD_TORCH_CHECK(hidden.dim() == 4, "hidden: expected 4 dimensions");
    STD_TORCH_CHECK(is_float_type(hidden.scalar_type()),
                    "hidden: expected float32, float16 or bfloat16");
    STD_TORCH_CHECK(skip.dim() == 4, "skip: expected 4 dimensions");
    STD_TORCH_CHECK(skip.scalar_type() == hidden.scalar_type(),
                    "skip: expected the dtype of hidden");
    STD_TORCH_CHECK(skip.device() == hidden.device(), "skip: expected the device of hidden");
    batch = hidden.size(0);
    hidden_channels = hidden.size(1);
    skip_channels = skip.size(1);
    height = hidden.size(2);
    width = hidden.size(3);
    STD_TORCH_CHECK(skip.size(2) == height && skip.size(3) == width,
                    "skip: expected the height and width of hidden");
    if (residual) {
      STD_TORCH_CHECK(residual->sizes().equals(skip.sizes()),
                      "residual: expected the shape of skip");
      STD_TORCH_CHECK(residual->scalar_type() == skip.scalar_type(),
                      "residual: expected the dtype of skip");
      STD_TORCH_CHECK(residual->device() == skip.device(), "residual: expected the device of skip");
    }
    if (rows) {
      STD_TORCH_CHECK(rows->dim() == 1 && rows->size(0) == batch,
                      "rows: expected one index a sample of hidden");
      STD_TORCH_CHECK(rows->scalar_type() == ScalarType::Long, "rows: expected int64");
      STD_TORCH_CHECK(rows->device() == hidden.device(), "rows: expected the device of hidden");
    } else {
      STD_TORCH_CHECK(skip.size(0) == batch, "skip: expected as many samples as hidden, or rows");
    }
    channels_last = is_channels_last(hidden) && is_channels_last(skip);
    if (channels_last) {
      dense = !residual || is_dense_channels_last(*residual);
    } else {
      dense =
          is_dense_nchw(hidden) && is_dense_nchw(skip) && (!residual || is_dense_nchw(*residual));
    }
  }

  Tensor new_result(const Tensor& hidden) const {
    const std::array<int64_t, 4> sizes{batch, hidden_channels + skip_channels, height, width};
    const auto format = channels_last ? torch::headeronly::MemoryFormat::ChannelsLast
                                      : torch::headeronly::MemoryFormat::Contiguous;
    return torch::stable::empty({sizes.data(), sizes.size()}, hidden.scalar_type(), std::nullopt,
                                hidden.device(), std::nullopt, format);
  }
};

// A row of cache and fresh as nested loops over the fewest dimensions: neighbours that both walk in
// step are one.
struct RowLoops {
  static constexpr int kMaxDims = 16;
  int dims = 0;  // the last is the innermost
  int64_t sizes[kMaxDims], cache_strides[kMaxDims], fresh_strides[kMaxDims];
  int64_t elements = 1;

  RowLoops(const Tensor& cache, const Tensor& fresh) {
    STD_TORCH_CHECK(cache.dim() >= 1, "cache: expected at least one dimension");
    STD_TORCH_CHECK(cache.dim() <= kMaxDims, "cache: expected at most 16 dimensions");
    STD_TORCH_CHECK(fresh.dim() == cache.dim(), "fresh: expected as many dimensions as cache");
    for (int64_t d = 1; d < cache.dim(); ++d) {
      STD_TORCH_CHECK(fresh.size(d) == cache.size(d),
                      "fresh: expected the shape of cache but for the first size");
      elements *= cache.size(d);
      if (cache.size(d) == 1) continue;
      // Insertion by falling stride in the cache, so that a channels_last row, too, ends up as one
      // run.
      int at = dims++;
      for (; at > 0 && cache_strides[at - 1] < cache.stride(d); --at) move(at - 1, at);
      sizes[at] = cache.size(d);
      cache_strides[at] = cache.stride(d);
      fresh_strides[at] = fresh.stride(d);
    }
    int kept = 0;
    for (int d = 1; d < dims; ++d) {
      if (cache_strides[kept] == cache_strides[d] * sizes[d] &&
          fresh_strides[kept] == fresh_strides[d] * sizes[d]) {
        const int64_t merged = sizes[kept] * sizes[d];
        move(d, kept);
        sizes[kept] = merged;
      } else {
        move(d, ++kept);
      }
    }
    if (dims > 0) dims = kept + 1;
    if (dims == 0) {  // one element a row
      dims = 1;
      sizes[0] = cache_strides[0] = fresh_strides[0] = 1;
    }
  }

  bool is_run() const { return dims == 1 && cache_strides[0] == 1 && fresh_strides[0] == 1; }

 private:
  void move(int from, int to) {
    sizes[to] = sizes[from];
    cache_strides[to] = cache_strides[from];
    fresh_strides[to] = fresh_strides[from];
  }
};

inline void check_scatter(const Tensor& cache, const Tensor& fresh, const Tensor& rows) {
  STD_TORCH_CHECK(fresh.scalar_type() == cache.scalar_type(), "fresh: expected the dtype of cache");
  STD_TORCH_CHECK(fresh.device() == cache.device(), "fresh: expected the device of cache");
  STD_TORCH_CHECK(rows.dim() == 1 && rows.size(0) == fresh.size(0),
                  "rows: expected one index a sample of fresh");
  STD_TORCH_CHECK(rows.scalar_type() == ScalarType::Long, "rows: expected int64");
  STD_TORCH_CHECK(rows.device() == cache.device(), "rows: expected the device of cache");
}

}  // namespace hgc
