// torch.ops.hgc_native on CUDA tensors: arguments in, pointers and the current stream out.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../cuda/kernels.h"
#include "arguments.h"
#include "build_info.h"

namespace hgc {
namespace {

cudaStream_t current_stream(int32_t device_index) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream) == 0,
                  "no current stream of the tensor's device");
  return static_cast<cudaStream_t>(stream);
}

Tensor gather_blocks(const Tensor& hidden, const Tensor& skip, std::optional<Tensor> residual,
                     double scale) {
  const Gather g(hidden, skip, residual, scale);
  const torch::stable::accelerator::DeviceGuard guard(g.device.index());
  Tensor out = g.new_result(aoti_torch_device_type_cuda());
  if (g.elements() == 0) return out;
  void* out_ptr = out.mutable_data_ptr();
  const Element element = element_of(g.type);
  const cudaStream_t stream = current_stream(g.device.index());
  const cudaError_t error =
      g.dense ? cuda::gather_dense(g.dense_arguments(out_ptr), element, stream)
              : cuda::gather_strided(g.strided_arguments(out_ptr), element, stream);
  STD_TORCH_CHECK(error == cudaSuccess,
                  "gather_blocks: the kernel did not launch: ", cudaGetErrorString(error));
  return out;
}

constexpr char kRoutedGather[] = "hgc_routed::gather_blocks";

}  // namespace
}  // namespace hgc

STABLE_TORCH_LIBRARY_IMPL(hgc, CUDA, m) {
  m.impl("gather_blocks",
         &hgc::kernel_or_router<TORCH_BOX(&hgc::gather_blocks), hgc::kRoutedGather>);
}

STABLE_TORCH_LIBRARY_IMPL(hgc_native, CUDA, m) {
  m.impl("gather_blocks", TORCH_BOX(&hgc::gather_blocks));
}

// Plain C, for the introspection module.
extern "C" {
__attribute__((visibility("default"))) void hgc_run_directly(int on) {
  hgc::runs_directly = on != 0;
}

__attribute__((visibility("default"))) const char* hgc_build_info() { return HGC_BUILD_INFO; }

// Fills in the index-th kernel's name and attributes. Returns 1 past the last kernel, and -1 with
// the CUDA error's text in *name where there is no device to ask.
__attribute__((visibility("default"))) int hgc_kernel_attributes(int index, const char** name,
                                                                 int* registers,
                                                                 int64_t* shared_bytes,
                                                                 int64_t* local_bytes,
                                                                 int* max_threads) {
  int count = 0;
  const hgc::cuda::NamedKernel* kernels = hgc::cuda::gather_kernels(&count);
  if (index < 0 || index >= count) return 1;
  const hgc::cuda::NamedKernel& kernel = kernels[index];
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
