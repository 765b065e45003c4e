// What the kernels share: the shape of a launch, division by a run-time constant, row indices.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels.h"

namespace hgc::cuda {

inline constexpr int kThreads = 256;
// Vectors a thread has in flight: enough loads outstanding to cover the latency of memory.
inline constexpr int kUnroll = 4;
inline constexpr int kVectorBytes = 16;

// n / divisor for n below 2^31, by one multiplication (Granlund and Montgomery, "Division by
// invariant integers using multiplication", 1994, with the shift folded in).
class FastDivisor {
 public:
  FastDivisor() = default;
  explicit FastDivisor(uint32_t divisor) : divisor_(divisor) {
    while (shift_ < 32 && (uint64_t{1} << shift_) < divisor) ++shift_;
    multiplier_ = static_cast<uint32_t>(
        ((uint64_t{1} << 32) * ((uint64_t{1} << shift_) - divisor)) / divisor + 1);
  }
  __device__ __forceinline__ uint32_t quotient(uint32_t n) const {
    return (__umulhi(n, multiplier_) + n) >> shift_;
  }
  __device__ __forceinline__ void split(uint32_t n, uint32_t* quotient_out, uint32_t* rest) const {
    *quotient_out = quotient(n);
    *rest = n - *quotient_out * divisor_;
  }

 private:
  uint32_t divisor_ = 1;
  uint32_t multiplier_ = 1;
  uint32_t shift_ = 0;
};

// The same face for sizes that need 64 bits.
class WideDivisor {
 public:
  WideDivisor() = default;
  explicit WideDivisor(int64_t divisor) : divisor_(divisor) {}
  __device__ __forceinline__ int64_t quotient(int64_t n) const { return n / divisor_; }
  __device__ __forceinline__ void split(int64_t n, int64_t* quotient_out, int64_t* rest) const {
    *quotient_out = n / divisor_;
    *rest = n - *quotient_out * divisor_;
  }

 private:
  int64_t divisor_ = 1;
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
inline bool fits_narrow(int64_t items) {
  return items < (int64_t{1} << 31) - 2 * kThreads * kUnroll;
}

inline bool is_aligned(const void* ptr) {
  return reinterpret_cast<uintptr_t>(ptr) % kVectorBytes == 0;
}

__device__ __forceinline__ int64_t row_of(const RowIndex& rows, int64_t sample) {
  return rows.ptr ? rows.ptr[sample * rows.stride] : sample;
}
__device__ __forceinline__ bool in_range(const RowIndex& rows, int64_t row) {
  return row >= 0 && row < rows.bound;
}

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
inline dim3 grid_of(int64_t items) {
  return dim3(static_cast<unsigned>((items + kThreads * kUnroll - 1) / (kThreads * kUnroll)));
}

}  // namespace hgc::cuda
