// What the CPU and the CUDA binding both need to know of their arguments. The public Python
// functions have checked them already; a direct call of torch.ops.hgc has not, so whatever a
// kernel's memory accesses rely on is checked here again.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <optional>

#include "../gather.h"

namespace hgc {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Whether the ops of `hgc` run this library's kernels without a word of Python. Where not, the
// router in Python decides, under `hgc_routed`: it obeys what was chosen, and sets this where
// nothing was.
inline std::atomic<bool> runs_directly{false};

template <auto kKernel, const char* kRouted>
void kernel_or_router(StableIValue* stack, uint64_t num_arguments, uint64_t num_results) {
  if (runs_directly.load(std::memory_order_relaxed)) {
    kKernel(stack, num_arguments, num_results);
  } else {
    STD_TORCH_CHECK(
        torch_call_dispatcher(kRouted, "", stack, TORCH_ABI_VERSION) == 0, kRouted,
        ": its backend did not run this call; the public function of hgc_kernels says why");
  }
}

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

// A [B, C, H, W] tensor, asked for its sizes and strides once: each question of torch's stable ABI
// costs nanoseconds.
struct Blocks {
  const int64_t *sizes, *strides;
  const void* ptr;

  Blocks(const Tensor& x, const char* name) {
    const auto found = x.sizes();
    STD_TORCH_CHECK(found.size() == 4, name, ": expected 4 dimensions");
    sizes = found.data();
    STD_TORCH_CHECK(aoti_torch_get_strides(x.get(), const_cast<int64_t**>(&strides)) == 0, name,
                    ": no strides");
    ptr = x.const_data_ptr();
  }

  // Whether the samples are dense in NCHW order; the batch stride is free.
  bool is_dense_nchw() const {
    return (sizes[3] == 1 || strides[3] == 1) && (sizes[2] == 1 || strides[2] == sizes[3]) &&
           (sizes[1] == 1 || strides[1] == sizes[2] * sizes[3]);
  }

  // In channels_last order, which one of a single channel is as well.
  bool is_dense_channels_last() const {
    return (sizes[1] == 1 || strides[1] == 1) && (sizes[3] == 1 || strides[3] == sizes[1]) &&
           (sizes[2] == 1 || strides[2] == sizes[1] * sizes[3]);
  }

  // As hgc_kernels.layout.is_channels_last: the fake must come to the same strides.
  bool is_channels_last() const {
    return sizes[1] != 1 && sizes[2] * sizes[3] != 1 && is_dense_channels_last();
  }
};

// A call of gather_blocks, checked.
struct Gather {
  const ScalarType type;
  int32_t dtype;  // the same, as torch's C functions have it
  const torch::stable::Device device;
  const Blocks hidden, skip;
  std::optional<Blocks> residual;
  const float scale;
  int64_t batch, hidden_channels, skip_channels, height, width;
  bool channels_last;  // the order of the result
  bool dense;          // every input has it too

  Gather(const Tensor& hidden_tensor, const Tensor& skip_tensor,
         const std::optional<Tensor>& residual_tensor, double scale)
      : type(hidden_tensor.scalar_type()),
        device(hidden_tensor.device()),
        hidden(hidden_tensor, "hidden"),
        skip(skip_tensor, "skip"),
        scale(static_cast<float>(scale)) {
    STD_TORCH_CHECK(aoti_torch_get_dtype(hidden_tensor.get(), &dtype) == 0, "hidden: no dtype");
    STD_TORCH_CHECK(is_float_type(type), "hidden: expected float32, float16 or bfloat16");
    STD_TORCH_CHECK(skip_tensor.scalar_type() == type, "skip: expected the dtype of hidden");
    STD_TORCH_CHECK(skip_tensor.device() == device, "skip: expected the device of hidden");
    batch = hidden.sizes[0];
    hidden_channels = hidden.sizes[1];
    skip_channels = skip.sizes[1];
    height = hidden.sizes[2];
    width = hidden.sizes[3];
    STD_TORCH_CHECK(
        skip.sizes[0] == batch && skip.sizes[2] == height && skip.sizes[3] == width,
        "skip: expected the samples, height and width of hidden");
    if (residual_tensor) {
      residual.emplace(*residual_tensor, "residual");
      STD_TORCH_CHECK(std::equal(skip.sizes, skip.sizes + 4, residual->sizes),
                      "residual: expected the shape of skip");
      STD_TORCH_CHECK(residual_tensor->scalar_type() == type,
                      "residual: expected the dtype of skip");
      STD_TORCH_CHECK(residual_tensor->device() == device,
                      "residual: expected the device of skip");
    }
    channels_last = hidden.is_channels_last() && skip.is_channels_last();
    dense = channels_last ? !residual || residual->is_dense_channels_last()
                          : hidden.is_dense_nchw() && skip.is_dense_nchw() &&
                                (!residual || residual->is_dense_nchw());
  }

  int64_t elements() const { return batch * (hidden_channels + skip_channels) * height * width; }

  std::array<int64_t, 4> out_strides() const {
    const int64_t channels = hidden_channels + skip_channels;
    if (channels_last) return {channels * height * width, 1, width * channels, channels};
    // as torch: a size of zero counts as one
    const int64_t row = std::max<int64_t>(width, 1), plane = row * std::max<int64_t>(height, 1);
    return {plane * std::max<int64_t>(channels, 1), plane, row, 1};
  }

  // Not `torch::stable::empty`, which asks the dispatcher and takes as long as all the rest of a
  // small call.
  Tensor new_result(int32_t device_type) const {
    const int64_t sizes[4] = {batch, hidden_channels + skip_channels, height, width};
    AtenTensorHandle out = nullptr;
    STD_TORCH_CHECK(aoti_torch_empty_strided(4, sizes, out_strides().data(), dtype, device_type,
                                             device.index(), &out) == 0,
                    "gather_blocks: no memory for the result");
    return Tensor(out);
  }

  const void* residual_ptr() const { return residual ? residual->ptr : nullptr; }

  GatherDense dense_arguments(void* out_ptr) const {
    const int64_t pixels = height * width;
    const int64_t runs = channels_last ? pixels : 1;
    return {hidden.ptr,
            skip.ptr,
            residual_ptr(),
            out_ptr,
            batch,
            runs,
            hidden_channels * pixels / runs,
            skip_channels * pixels / runs,
            hidden.strides[0],
            skip.strides[0],
            residual ? residual->strides[0] : 0,
            scale};
  }

  GatherStrided strided_arguments(void* out_ptr) const {
    const auto strides = out_strides();
    GatherStrided a{hidden.ptr, skip.ptr, residual_ptr(), out_ptr, batch, hidden_channels,
                    skip_channels, height, width, {}, {}, {}, {}, scale};
    for (int d = 0; d < 4; ++d) {
      a.hidden_strides[d] = hidden.strides[d];
      a.skip_strides[d] = skip.strides[d];
      a.residual_strides[d] = residual ? residual->strides[d] : 0;
      a.out_strides[d] = strides[d];
    }
    return a;
  }
};

}  // namespace hgc
