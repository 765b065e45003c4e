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

#include "../gather.h"

namespace hgc {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool is_float_type(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16;
}

inline Element element_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return Element::kFloat;
    case ScalarType::Half:
      return Element::kHalf;
    case ScalarType::BFloat16:
      return Element::kBFloat;
    default:
      return Element::kE4m3;
  }
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

// A call of gather_blocks, checked.
struct Gather {
  const Tensor &hidden, &skip;
  const std::optional<Tensor>& residual;
  const float scale;
  int64_t batch, hidden_channels, skip_channels, height, width;
  bool channels_last;  // the order of the result
  bool dense;          // every input has it too

  Gather(const Tensor& hidden, const Tensor& skip, const std::optional<Tensor>& residual,
         double scale)
      : hidden(hidden), skip(skip), residual(residual), scale(static_cast<float>(scale)) {
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
    STD_TORCH_CHECK(skip.size(0) == batch && skip.size(2) == height && skip.size(3) == width,
                    "skip: expected the samples, height and width of hidden");
    if (residual) {
      STD_TORCH_CHECK(residual->sizes().equals(skip.sizes()),
                      "residual: expected the shape of skip");
      STD_TORCH_CHECK(residual->scalar_type() == skip.scalar_type(),
                      "residual: expected the dtype of skip");
      STD_TORCH_CHECK(residual->device() == skip.device(), "residual: expected the device of skip");
    }
    channels_last = is_channels_last(hidden) && is_channels_last(skip);
    if (channels_last) {
      dense = !residual || is_dense_channels_last(*residual);
    } else {
      dense =
          is_dense_nchw(hidden) && is_dense_nchw(skip) && (!residual || is_dense_nchw(*residual));
    }
  }

  Tensor new_result() const {
    const std::array<int64_t, 4> sizes{batch, hidden_channels + skip_channels, height, width};
    const auto format = channels_last ? torch::headeronly::MemoryFormat::ChannelsLast
                                      : torch::headeronly::MemoryFormat::Contiguous;
    return torch::stable::empty({sizes.data(), sizes.size()}, hidden.scalar_type(), std::nullopt,
                                hidden.device(), std::nullopt, format);
  }

  const void* residual_ptr() const { return residual ? residual->const_data_ptr() : nullptr; }

  GatherDense dense_arguments(const Tensor& out) const {
    const int64_t pixels = height * width;
    const int64_t runs = channels_last ? pixels : 1;
    return {hidden.const_data_ptr(),
            skip.const_data_ptr(),
            residual_ptr(),
            out.mutable_data_ptr(),
            batch,
            runs,
            hidden_channels * pixels / runs,
            skip_channels * pixels / runs,
            hidden.stride(0),
            skip.stride(0),
            residual ? residual->stride(0) : 0,
            scale};
  }

  GatherStrided strided_arguments(const Tensor& out) const {
    GatherStrided a{hidden.const_data_ptr(),
                    skip.const_data_ptr(),
                    residual_ptr(),
                    out.mutable_data_ptr(),
                    batch,
                    hidden_channels,
                    skip_channels,
                    height,
                    width,
                    {},
                    {},
                    {},
                    {},
                    scale};
    for (int d = 0; d < 4; ++d) {
      a.hidden_strides[d] = hidden.stride(d);
      a.skip_strides[d] = skip.stride(d);
      a.residual_strides[d] = residual ? residual->stride(d) : 0;
      a.out_strides[d] = out.stride(d);
    }
    return a;
  }
};

}  // namespace hgc
