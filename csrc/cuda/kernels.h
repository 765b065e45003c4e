// Launchers of the CUDA kernels: raw pointers and a stream in, a cudaError_t out, nothing known of
// torch.
#pragma once

#include <cuda_runtime_api.h>

#include "../gather.h"

namespace hgc::cuda {

cudaError_t gather_dense(const GatherDense& args, Element element, cudaStream_t stream);
cudaError_t gather_strided(const GatherStrided& args, Element element, cudaStream_t stream);

// For introspection: every kernel by name. Returns null past the last one.
struct NamedKernel {
  const char* name;
  const void* function;
};
const NamedKernel* gather_kernels(int* count);

}  // namespace hgc::cuda
