#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "kernels.h"

namespace hgc::cuda {
namespace {

constexpr int kThreads = 256;
// Vectors a thread has in flight: enough loads outstanding to cover the latency of memory.
constexpr int kUnroll = 4;
constexpr int kVectorBytes = 16;

// n / divisor for n below 2^31, by one multiplication (Granlund and Montgomery, "Division by
// invariant integers using multiplication", 1994, with the shift folded in).
class FastDivisor {
 public:
  explicit FastDivisor(uint32_t divisor) : divisor_(divisor) {
    while (shift_ < 32 && (uint64_t{1} << shift_) < divisor) ++shift_;
    multiplier_ = static_cast<uint32_t>(
        ((uint64_t{1} << 32) * ((uint64_t{1} << shift_) - divisor)) / divisor + 1);
  }
  __device__ __forceinline__ void split(uint32_t n, uint32_t* quotient_out, uint32_t* rest) const {
    *quotient_out = (__umulhi(n, multiplier_) + n) >> shift_;
    *rest = n - *quotient_out * divisor_;
  }

 private:
  uint32_t divisor_;
  uint32_t multiplier_;
  uint32_t shift_ = 0;
};

// The same face for sizes that need 64 bits.
class WideDivisor {
 public:
  explicit WideDivisor(int64_t divisor) : divisor_(divisor) {}
  __device__ __forceinline__ void split(int64_t n, int64_t* quotient_out, int64_t* rest) const {
    *quotient_out = n / divisor_;
    *rest = n - *quotient_out * divisor_;
  }

 private:
  int64_t divisor_;
};

struct Narrow {
  using Index = uint32_t;
  using Divisor = FastDivisor;
};
struct Wide {
  using Index = int64_t;
  using Divisor = WideDivisor;
};

// Whether every index a kernel forms, the overhang of its last block included, stays below 2^31.
bool fits_narrow(int64_t items) { return items < (int64_t{1} << 31) - 2 * kThreads * kUnroll; }

bool is_aligned(const void* ptr) { return reinterpret_cast<uintptr_t>(ptr) % kVectorBytes == 0; }

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Blocks of kThreads * kUnroll items each.
dim3 grid_of(int64_t items) {
  return dim3(static_cast<unsigned>((items + kThreads * kUnroll - 1) / (kThreads * kUnroll)));
}

// Rounds scale * residual to T before the sum, as eager's two ops do; the _rn intrinsics are never
// fused into an FMA.
template <typename T>
__device__ __forceinline__ T blend(T skip, T residual, float scale) {
  const float scaled = to_float(from_float<T>(__fmul_rn(scale, to_float(residual))));
  return from_float<T>(__fadd_rn(to_float(skip), scaled));
}

// kWidth elements of T as the registers that one load fills. Plain words rather than an array of T,
// which the compiler keeps in local memory on some targets.
template <typename T, int kWidth>
struct Packed {
  using Word = std::conditional_t<kWidth == 1, T, uint4>;
  static_assert(kWidth == 1 || sizeof(T) * kWidth == sizeof(uint4), "one element or 16 bytes");
};

template <typename T>
__device__ __forceinline__ uint32_t blend_word(uint32_t skip, uint32_t residual, float scale) {
  if constexpr (sizeof(T) == 4) {
    return __float_as_uint(blend<float>(__uint_as_float(skip), __uint_as_float(residual), scale));
  } else {
    T a[2], r[2];
    memcpy(a, &skip, 4);
    memcpy(r, &residual, 4);
    a[0] = blend(a[0], r[0], scale);
    a[1] = blend(a[1], r[1], scale);
    memcpy(&skip, a, 4);
    return skip;
  }
}

template <typename T>
__device__ __forceinline__ uint4 blend_packed(uint4 skip, uint4 residual, float scale) {
  return make_uint4(
      blend_word<T>(skip.x, residual.x, scale), blend_word<T>(skip.y, residual.y, scale),
      blend_word<T>(skip.z, residual.z, scale), blend_word<T>(skip.w, residual.w, scale));
}
template <typename T>
__device__ __forceinline__ T blend_packed(T skip, T residual, float scale) {
  return blend(skip, residual, scale);
}

template <typename Size>
struct GatherDivisors {
  typename Size::Divisor run;              // vectors a run
  typename Size::Divisor runs_per_sample;  // runs a sample
  typename Size::Index hidden_vectors;     // vectors of a run that come from hidden
  typename Size::Index total;              // vectors of the result
};

// One vector of kWidth elements a step and thread; kWidth 1 is the path for pointers or sizes that
// are not multiples of 16 bytes.
template <typename T, int kWidth, bool kResidual, typename Size>
__global__ void __launch_bounds__(kThreads)
    gather_blocks_dense_kernel(const GatherDense args, const GatherDivisors<Size> divisors) {
  using Index = typename Size::Index;
  using Vec = typename Packed<T, kWidth>::Word;
  const Index first = static_cast<Index>(blockIdx.x) * (kThreads * kUnroll) + threadIdx.x;
  Vec value[kUnroll];
  Vec residual[kUnroll];
  bool is_skip[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const Index i = first + u * kThreads;
    is_skip[u] = false;
    if (i >= divisors.total) continue;
    Index run, column, sample, within;
    divisors.run.split(i, &run, &column);
    divisors.runs_per_sample.split(run, &sample, &within);
    if (column < divisors.hidden_vectors) {
      const int64_t offset = sample * args.hidden_stride + within * args.hidden_run +
                             static_cast<int64_t>(column) * kWidth;
      value[u] = *reinterpret_cast<const Vec*>(static_cast<const T*>(args.hidden_ptr) + offset);
      continue;
    }
    const int64_t offset =
        within * args.skip_run + static_cast<int64_t>(column - divisors.hidden_vectors) * kWidth;
    value[u] = *reinterpret_cast<const Vec*>(static_cast<const T*>(args.skip_ptr) +
                                             sample * args.skip_stride + offset);
    if constexpr (kResidual) {
      is_skip[u] = true;
      residual[u] = *reinterpret_cast<const Vec*>(static_cast<const T*>(args.residual_ptr) +
                                                  sample * args.residual_stride + offset);
    }
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const Index i = first + u * kThreads;
    if (i >= divisors.total) continue;
    if constexpr (kResidual) {
      if (is_skip[u]) value[u] = blend_packed<T>(value[u], residual[u], args.scale);
    }
    *reinterpret_cast<Vec*>(static_cast<T*>(args.out_ptr) + static_cast<int64_t>(i) * kWidth) =
        value[u];
  }
}

// Inputs of any strides, an element a thread.
template <typename T, bool kResidual>
__global__ void __launch_bounds__(kThreads) gather_blocks_strided_kernel(const GatherStrided args) {
  const int64_t channels = args.hidden_channels + args.skip_channels;
  int64_t rest = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t x = rest % args.width;
  rest /= args.width;
  const int64_t y = rest % args.height;
  rest /= args.height;
  const int64_t c = rest % channels;
  const int64_t b = rest / channels;
  if (b >= args.samples) return;
  T value;
  if (c < args.hidden_channels) {
    value = static_cast<const T*>(
        args.hidden_ptr)[b * args.hidden_strides[0] + c * args.hidden_strides[1] +
                         y * args.hidden_strides[2] + x * args.hidden_strides[3]];
  } else {
    const int64_t k = c - args.hidden_channels;
    value =
        static_cast<const T*>(args.skip_ptr)[b * args.skip_strides[0] + k * args.skip_strides[1] +
                                             y * args.skip_strides[2] + x * args.skip_strides[3]];
    if constexpr (kResidual) {
      const T residual = static_cast<const T*>(
          args.residual_ptr)[b * args.residual_strides[0] + k * args.residual_strides[1] +
                             y * args.residual_strides[2] + x * args.residual_strides[3]];
      value = blend(value, residual, args.scale);
    }
  }
  static_cast<T*>(args.out_ptr)[b * args.out_strides[0] + c * args.out_strides[1] +
                                y * args.out_strides[2] + x * args.out_strides[3]] = value;
}

template <typename T, int kWidth, bool kResidual, typename Size>
cudaError_t launch_dense(const GatherDense& args, int64_t vectors, cudaStream_t stream) {
  using Index = typename Size::Index;
  using Divisor = typename Size::Divisor;
  const GatherDivisors<Size> divisors{
      Divisor(static_cast<Index>((args.hidden_run + args.skip_run) / kWidth)),
      Divisor(static_cast<Index>(args.runs_per_sample)),
      static_cast<Index>(args.hidden_run / kWidth), static_cast<Index>(vectors)};
  gather_blocks_dense_kernel<T, kWidth, kResidual, Size>
      <<<grid_of(vectors), kThreads, 0, stream>>>(args, divisors);
  return cudaGetLastError();
}

template <typename T, int kWidth>
cudaError_t pick_dense(const GatherDense& args, cudaStream_t stream) {
  const int64_t vectors =
      args.samples * args.runs_per_sample * ((args.hidden_run + args.skip_run) / kWidth);
  if (fits_narrow(vectors)) {
    return args.residual_ptr ? launch_dense<T, kWidth, true, Narrow>(args, vectors, stream)
                             : launch_dense<T, kWidth, false, Narrow>(args, vectors, stream);
  }
  return args.residual_ptr ? launch_dense<T, kWidth, true, Wide>(args, vectors, stream)
                           : launch_dense<T, kWidth, false, Wide>(args, vectors, stream);
}

template <typename T>
cudaError_t gather_dense_of(const GatherDense& args, cudaStream_t stream) {
  constexpr int kWidth = kVectorBytes / sizeof(T);
  const bool aligned = is_aligned(args.hidden_ptr) && is_aligned(args.skip_ptr) &&
                       is_aligned(args.residual_ptr) && is_aligned(args.out_ptr) &&
                       args.hidden_run % kWidth == 0 && args.skip_run % kWidth == 0 &&
                       args.hidden_stride % kWidth == 0 && args.skip_stride % kWidth == 0 &&
                       args.residual_stride % kWidth == 0;
  return aligned ? pick_dense<T, kWidth>(args, stream) : pick_dense<T, 1>(args, stream);
}

template <typename T>
cudaError_t gather_strided_of(const GatherStrided& args, cudaStream_t stream) {
  const int64_t elements =
      args.samples * (args.hidden_channels + args.skip_channels) * args.height * args.width;
  const dim3 grid(static_cast<unsigned>((elements + kThreads - 1) / kThreads));
  if (args.residual_ptr) {
    gather_blocks_strided_kernel<T, true><<<grid, kThreads, 0, stream>>>(args);
  } else {
    gather_blocks_strided_kernel<T, false><<<grid, kThreads, 0, stream>>>(args);
  }
  return cudaGetLastError();
}

#define HGC_DENSE(T, kWidth, kResidual, Size)                                    \
  {"gather_blocks_dense_kernel<" #T ", " #kWidth ", " #kResidual ", " #Size ">", \
   reinterpret_cast<const void*>(&gather_blocks_dense_kernel<T, kWidth, kResidual, Size>)}
#define HGC_DENSE_ALL(T, kWidth)                                           \
  HGC_DENSE(T, kWidth, true, Narrow), HGC_DENSE(T, kWidth, false, Narrow), \
      HGC_DENSE(T, kWidth, true, Wide), HGC_DENSE(T, kWidth, false, Wide)
#define HGC_STRIDED(T, kResidual)                          \
  {"gather_blocks_strided_kernel<" #T ", " #kResidual ">", \
   reinterpret_cast<const void*>(&gather_blocks_strided_kernel<T, kResidual>)}

const NamedKernel kKernels[] = {
    HGC_DENSE_ALL(float, 4),    HGC_DENSE_ALL(float, 1),          HGC_DENSE_ALL(__half, 8),
    HGC_DENSE_ALL(__half, 1),   HGC_DENSE_ALL(__nv_bfloat16, 8),  HGC_DENSE_ALL(__nv_bfloat16, 1),
    HGC_STRIDED(float, true),   HGC_STRIDED(float, false),        HGC_STRIDED(__half, true),
    HGC_STRIDED(__half, false), HGC_STRIDED(__nv_bfloat16, true), HGC_STRIDED(__nv_bfloat16, false),
};

}  // namespace

cudaError_t gather_dense(const GatherDense& args, Element element, cudaStream_t stream) {
  switch (element) {
    case Element::kFloat:
      return gather_dense_of<float>(args, stream);
    case Element::kHalf:
      return gather_dense_of<__half>(args, stream);
    case Element::kBFloat:
      return gather_dense_of<__nv_bfloat16>(args, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t gather_strided(const GatherStrided& args, Element element, cudaStream_t stream) {
  switch (element) {
    case Element::kFloat:
      return gather_strided_of<float>(args, stream);
    case Element::kHalf:
      return gather_strided_of<__half>(args, stream);
    case Element::kBFloat:
      return gather_strided_of<__nv_bfloat16>(args, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

const NamedKernel* gather_kernels(int* count) {
  *count = sizeof(kKernels) / sizeof(kKernels[0]);
  return kKernels;
}

}  // namespace hgc::cuda
