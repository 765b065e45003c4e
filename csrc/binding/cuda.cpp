// torch.ops.hgc_native on CUDA tensors: arguments in, pointers and the current stream out.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../cuda/kernels.h"
#include "arguments.h"
#include "build_info.h"

namespace hgc {
namespace {

cuda::Element element_of(ScalarType type) {
  if (type == ScalarType::Float) return cuda::Element::kFloat;
  return type == ScalarType::Half ? cuda::Element::kHalf : cuda::Element::kBFloat;
}

cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream) == 0,
                  "no current stream of the tensor's device");
  return static_cast<cudaStream_t>(stream);
}

void check_launch(const char* op, cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, op,
                  ": the kernel did not launch: ", cudaGetErrorString(error));
}

cuda::RowIndex row_index(const std::optional<Tensor>& rows, int64_t bound) {
  if (!rows) return {nullptr, 0, bound};
  return {static_cast<const int64_t*>(rows->const_data_ptr()), rows->stride(0), bound};
}

Tensor gather_blocks(const Tensor& hidden, const Tensor& skip, std::optional<Tensor> residual,
                     std::optional<Tensor> rows, double scale) {
  const Gather g(hidden, skip, residual, rows);
  const torch::stable::accelerator::DeviceGuard guard(hidden.get_device_index());
  Tensor out = g.new_result(hidden);
  if (out.numel() == 0) return out;
  const cuda::Element element = element_of(hidden.scalar_type());
  const void* residual_ptr = residual ? residual->const_data_ptr() : nullptr;
  if (g.dense) {
    const int64_t pixels = g.height * g.width;
    const int64_t runs = g.channels_last ? pixels : 1;
    const cuda::GatherDense a{hidden.const_data_ptr(),
                              skip.const_data_ptr(),
                              residual_ptr,
                              row_index(rows, skip.size(0)),
                              out.mutable_data_ptr(),
                              g.batch,
                              runs,
                              g.hidden_channels * pixels / runs,
                              g.skip_channels * pixels / runs,
                              hidden.stride(0),
                              skip.stride(0),
                              residual ? residual->stride(0) : 0,
                              static_cast<float>(scale)};
    check_launch("gather_blocks", cuda::gather_dense(a, element, current_stream(hidden)));
    return out;
  }
  cuda::GatherStrided a{hidden.const_data_ptr(),
                        skip.const_data_ptr(),
                        residual_ptr,
                        row_index(rows, skip.size(0)),
                        out.mutable_data_ptr(),
                        g.batch,
                        g.hidden_channels,
                        g.skip_channels,
                        g.height,
                        g.width,
                        {},
                        {},
                        {},
                        {},
                        static_cast<float>(scale)};
  for (int d = 0; d < 4; ++d) {
    a.hidden_strides[d] = hidden.stride(d);
    a.skip_strides[d] = skip.stride(d);
    a.residual_strides[d] = residual ? residual->stride(d) : 0;
    a.out_strides[d] = out.stride(d);
  }
  check_launch("gather_blocks", cuda::gather_strided(a, element, current_stream(hidden)));
  return out;
}

void scatter_rows(const Tensor& cache, const Tensor& fresh, const Tensor& rows) {
  const RowLoops loops(cache, fresh);
  check_scatter(cache, fresh, rows);
  if (rows.size(0) == 0 || loops.elements == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(cache.get_device_index());
  cuda::ScatterRows a{cache.mutable_data_ptr(),
                      fresh.const_data_ptr(),
                      row_index(rows, cache.size(0)),
                      rows.size(0),
                      loops.elements,
                      static_cast<int64_t>(cache.element_size()),
                      cache.stride(0),
                      fresh.stride(0),
                      loops.is_run(),
                      loops.dims,
                      {},
                      {},
                      {}};
  for (int d = 0; d < loops.dims; ++d) {
    a.sizes[d] = loops.sizes[d];
    a.cache_strides[d] = loops.cache_strides[d];
    a.fresh_strides[d] = loops.fresh_strides[d];
  }
  check_launch("scatter_rows", cuda::scatter_rows(a, current_stream(cache)));
}

}  // namespace
}  // namespace hgc

STABLE_TORCH_LIBRARY_IMPL(hgc_native, CUDA, m) {
  m.impl("gather_blocks", TORCH_BOX(&hgc::gather_blocks));
  m.impl("scatter_rows", TORCH_BOX(&hgc::scatter_rows));
}

// Plain C, for the introspection module.
extern "C" {
__attribute__((visibility("default"))) const char* hgc_build_info() { return HGC_BUILD_INFO; }

// Fills in the index-th kernel's name and attributes. Returns 1 past the last kernel, and -1 with
// the CUDA error's text in *name where there is no device to ask.
__attribute__((visibility("default"))) int hgc_kernel_attributes(int index, const char** name,
                                                                 int* registers,
                                                                 int64_t* shared_bytes,
                                                                 int64_t* local_bytes,
                                                                 int* max_threads) {
  int gather_count = 0;
  int scatter_count = 0;
  const hgc::cuda::NamedKernel* gather = hgc::cuda::gather_kernels(&gather_count);
  const hgc::cuda::NamedKernel* scatter = hgc::cuda::scatter_kernels(&scatter_count);
  if (index < 0 || index >= gather_count + scatter_count) return 1;
  const hgc::cuda::NamedKernel& kernel =
      index < gather_count ? gather[index] : scatter[index - gather_count];
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel.function);
  if (error != cudaSuccess) {
    *name = cudaGetErrorString(error);
    return -1;
  }
  *name = kernel.name;
  *registers = attributes.numRegs;
  *shared_bytes = static_cast<int64_t>(attributes.sharedSizeBytes);
  *local_bytes = static_cast<int64_t>(attributes.localSizeBytes);
  *max_threads = attributes.maxThreadsPerBlock;
  return 0;
}
}
