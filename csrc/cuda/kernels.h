// Launchers of the CUDA kernels: raw pointers and a stream in, a cudaError_t out, nothing known of
// torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace hgc::cuda {

enum class Element : int { kFloat, kHalf, kBFloat };

// Samples to read, on the device. A row outside [0, bound) is never used as an address.
struct RowIndex {
  const int64_t* ptr;  // null: sample i is row i
  int64_t stride;
  int64_t bound;
};

// cat(hidden, skip[rows] + scale * residual[rows]) over inputs whose samples are dense in one and
// the same order; see hgc::cpu::GatherDense for the fields. A sample whose row is out of range
// becomes NaN.
struct GatherDense {
  const void* hidden_ptr;
  const void* skip_ptr;
  const void* residual_ptr;  // may be null
  RowIndex rows;
  void* out_ptr;
  int64_t samples;
  int64_t runs_per_sample;
  int64_t hidden_run;
  int64_t skip_run;
  int64_t hidden_stride;
  int64_t skip_stride;
  int64_t residual_stride;
  float scale;
};

struct GatherStrided {
  const void* hidden_ptr;
  const void* skip_ptr;
  const void* residual_ptr;
  RowIndex rows;
  void* out_ptr;
  int64_t samples, hidden_channels, skip_channels, height, width;
  int64_t hidden_strides[4], skip_strides[4], residual_strides[4], out_strides[4];
  float scale;
};

// cache[rows[i]] = fresh[i]; a row out of range is dropped. A row is `dims` nested loops, the last
// the innermost.
struct ScatterRows {
  static constexpr int kMaxDims = 16;
  void* cache_ptr;
  const void* fresh_ptr;
  RowIndex rows;
  int64_t samples;
  int64_t elements;  // a row
  int64_t element_bytes;
  int64_t cache_stride, fresh_stride;  // elements from row to row
  bool is_run;                         // a row is contiguous in both
  int dims;
  int64_t sizes[kMaxDims], cache_strides[kMaxDims], fresh_strides[kMaxDims];
};

cudaError_t gather_dense(const GatherDense& args, Element element, cudaStream_t stream);
cudaError_t gather_strided(const GatherStrided& args, Element element, cudaStream_t stream);
// Element sizes of 1, 2, 4 and 8 bytes.
cudaError_t scatter_rows(const ScatterRows& args, cudaStream_t stream);

// For introspection: every kernel by name. Returns null past the last one.
struct NamedKernel {
  const char* name;
  const void* function;
};
const NamedKernel* gather_kernels(int* count);
const NamedKernel* scatter_kernels(int* count);

}  // namespace hgc::cuda
