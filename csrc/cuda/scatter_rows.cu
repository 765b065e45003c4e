#include "device.cuh"

namespace hgc::cuda {
namespace {

// Rows that are contiguous in both, moved in units of T: 16 bytes where everything is a multiple of
// that.
template <typename T, typename Size>
__global__ void __launch_bounds__(kThreads)
    scatter_rows_dense_kernel(const ScatterRows args, const typename Size::Divisor units_a_row,
                              const typename Size::Index total, const int64_t cache_stride,
                              const int64_t fresh_stride) {
  using Index = typename Size::Index;
  const Index first = static_cast<Index>(blockIdx.x) * (kThreads * kUnroll) + threadIdx.x;
  T value[kUnroll];
  int64_t target[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const Index i = first + u * kThreads;
    target[u] = -1;
    if (i >= total) continue;
    Index sample, column;
    units_a_row.split(i, &sample, &column);
    const int64_t row = row_of(args.rows, sample);
    if (!in_range(args.rows, row)) continue;
    target[u] = row * cache_stride + column;
    value[u] = static_cast<const T*>(args.fresh_ptr)[sample * fresh_stride + column];
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (target[u] >= 0) static_cast<T*>(args.cache_ptr)[target[u]] = value[u];
  }
}

// Rows of any strides, an element a thread.
template <typename T>
__global__ void __launch_bounds__(kThreads) scatter_rows_strided_kernel(const ScatterRows args) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= args.samples * args.elements) return;
  const int64_t sample = i / args.elements;
  const int64_t row = row_of(args.rows, sample);
  if (!in_range(args.rows, row)) return;
  int64_t rest = i - sample * args.elements;
  int64_t to = row * args.cache_stride;
  int64_t from = sample * args.fresh_stride;
  for (int d = args.dims - 1; d >= 0; --d) {
    const int64_t index = rest % args.sizes[d];
    rest /= args.sizes[d];
    to += index * args.cache_strides[d];
    from += index * args.fresh_strides[d];
  }
  static_cast<T*>(args.cache_ptr)[to] = static_cast<const T*>(args.fresh_ptr)[from];
}

template <typename T>
cudaError_t launch_dense(const ScatterRows& args, cudaStream_t stream) {
  const int64_t bytes = args.element_bytes;
  const int64_t units = args.elements * bytes / static_cast<int64_t>(sizeof(T));
  const int64_t cache_stride = args.cache_stride * bytes / static_cast<int64_t>(sizeof(T));
  const int64_t fresh_stride = args.fresh_stride * bytes / static_cast<int64_t>(sizeof(T));
  const int64_t total = args.samples * units;
  if (fits_narrow(total)) {
    scatter_rows_dense_kernel<T, Narrow><<<grid_of(total), kThreads, 0, stream>>>(
        args, FastDivisor(static_cast<uint32_t>(units)), static_cast<uint32_t>(total), cache_stride,
        fresh_stride);
  } else {
    scatter_rows_dense_kernel<T, Wide><<<grid_of(total), kThreads, 0, stream>>>(
        args, WideDivisor(units), total, cache_stride, fresh_stride);
  }
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_element(const ScatterRows& args, cudaStream_t stream) {
  if (args.is_run) return launch_dense<T>(args, stream);
  const int64_t elements = args.samples * args.elements;
  const dim3 grid(static_cast<unsigned>((elements + kThreads - 1) / kThreads));
  scatter_rows_strided_kernel<T><<<grid, kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

#define HGC_SCATTER(T)                                                     \
  {"scatter_rows_dense_kernel<" #T ", Narrow>",                            \
   reinterpret_cast<const void*>(&scatter_rows_dense_kernel<T, Narrow>)},  \
  {                                                                        \
    "scatter_rows_dense_kernel<" #T ", Wide>",                             \
        reinterpret_cast<const void*>(&scatter_rows_dense_kernel<T, Wide>) \
  }
#define HGC_SCATTER_STRIDED(T)            \
  {"scatter_rows_strided_kernel<" #T ">", \
   reinterpret_cast<const void*>(&scatter_rows_strided_kernel<T>)}

const NamedKernel kKernels[] = {
    HGC_SCATTER(uint4),
    HGC_SCATTER(uint8_t),
    HGC_SCATTER(uint16_t),
    HGC_SCATTER(uint32_t),
    HGC_SCATTER(uint64_t),
    HGC_SCATTER_STRIDED(uint8_t),
    HGC_SCATTER_STRIDED(uint16_t),
    HGC_SCATTER_STRIDED(uint32_t),
    HGC_SCATTER_STRIDED(uint64_t),
};

}  // namespace

cudaError_t scatter_rows(const ScatterRows& args, cudaStream_t stream) {
  const int64_t bytes = args.element_bytes;
  const bool aligned = args.is_run && is_aligned(args.cache_ptr) && is_aligned(args.fresh_ptr) &&
                       args.elements * bytes % kVectorBytes == 0 &&
                       args.cache_stride * bytes % kVectorBytes == 0 &&
                       args.fresh_stride * bytes % kVectorBytes == 0;
  if (aligned) return launch_dense<uint4>(args, stream);
  switch (bytes) {
    case 1:
      return launch_element<uint8_t>(args, stream);
    case 2:
      return launch_element<uint16_t>(args, stream);
    case 4:
      return launch_element<uint32_t>(args, stream);
    case 8:
      return launch_element<uint64_t>(args, stream);
  }
  return cudaErrorInvalidValue;
}

const NamedKernel* scatter_kernels(int* count) {
  *count = sizeof(kKernels) / sizeof(kKernels[0]);
  return kKernels;
}

}  // namespace hgc::cuda
