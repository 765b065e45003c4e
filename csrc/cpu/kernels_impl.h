// The kernels, written once over simd.h. Included by one file an instruction set, which names it in HGC_ISA.
// No standard library templates here: their out-of-line copies would be compiled for this instruction set and could then
// be linked into code that runs on any processor.
#include <stdlib.h>

#include "kernels.h"
#include "simd.h"

namespace hgc::cpu::HGC_ISA {
namespace {

template <typename T>
HGC_INLINE T blend(T skip, T residual, float scale) {
  // Two roundings, as eager's two ops have; -ffp-contract=off keeps the compiler from fusing them.
  const float scaled = to_float(from_float<T>(scale * to_float(residual)));
  return from_float<T>(to_float(skip) + scaled);
}

template <typename T>
HGC_INLINE Vec blend_vec(const T* skip, const T* residual, Vec scale) {
  return add(load(skip), round_to(mul(scale, load(residual)), T{}));
}

template <typename T>
void copy_run(T* out, const T* from, int64_t n, bool stream) {
  if (!stream || n * static_cast<int64_t>(sizeof(T)) < 4 * kLineBytes) {
    memcpy(out, from, n * sizeof(T));
    return;
  }
  constexpr int64_t kLine = kLineBytes / sizeof(T);
  int64_t i = ((kLineBytes - reinterpret_cast<uintptr_t>(out) % kLineBytes) % kLineBytes) / sizeof(T);
  memcpy(out, from, i * sizeof(T));
  for (; i + kLine <= n; i += kLine) copy_line(out + i, from + i);
  memcpy(out + i, from + i, (n - i) * sizeof(T));
}

template <typename T>
void blend_run(T* out, const T* skip, const T* residual, float scale, int64_t n, bool stream) {
  constexpr int64_t kLine = kLineBytes / sizeof(T);
  const Vec scale_vec = broadcast(scale);
  int64_t i = 0;
  if (stream && n >= 4 * kLine) {
    const int64_t head = ((kLineBytes - reinterpret_cast<uintptr_t>(out) % kLineBytes) % kLineBytes) / sizeof(T);
    for (; i < head; ++i) out[i] = blend(skip[i], residual[i], scale);
    for (; i + kLine <= n; i += kLine) {
      Vec line[kLine / Vec::kWidth];
      for (int64_t j = 0; j < kLine / Vec::kWidth; ++j) {
        line[j] = blend_vec(skip + i + j * Vec::kWidth, residual + i + j * Vec::kWidth, scale_vec);
      }
      stream_line(out + i, line);
    }
  }
  for (; i + Vec::kWidth <= n; i += Vec::kWidth) store(out + i, blend_vec(skip + i, residual + i, scale_vec));
  for (; i < n; ++i) out[i] = blend(skip[i], residual[i], scale);
}

template <typename T>
void gather_dense(const GatherDense& a, int64_t begin, int64_t end) {
  const int64_t run = a.hidden_run + a.skip_run;
  T* out = static_cast<T*>(a.out_ptr);
  int64_t i = begin;
  while (i < end) {
    const int64_t index = i / run;
    const int64_t sample = index / a.runs_per_sample;
    const int64_t within = index % a.runs_per_sample;
    int64_t column = i - index * run;
    const int64_t stop = (end - index * run < run) ? end - index * run : run;
    if (column < a.hidden_run) {
      const int64_t n = (stop < a.hidden_run ? stop : a.hidden_run) - column;
      const T* hidden = static_cast<const T*>(a.hidden_ptr) + sample * a.hidden_stride + within * a.hidden_run;
      copy_run(out + i, hidden + column, n, a.stream);
      i += n;
      column += n;
    }
    if (column < stop) {
      const int64_t n = stop - column;
      const int64_t row = a.rows_ptr ? a.rows_ptr[sample] : sample;
      const int64_t offset = within * a.skip_run + (column - a.hidden_run);
      const T* skip = static_cast<const T*>(a.skip_ptr) + row * a.skip_stride + offset;
      if (a.residual_ptr) {
        const T* residual = static_cast<const T*>(a.residual_ptr) + row * a.residual_stride + offset;
        blend_run(out + i, skip, residual, a.scale, n, a.stream);
      } else {
        copy_run(out + i, skip, n, a.stream);
      }
      i += n;
    }
  }
  if (a.stream) stream_fence();
}

template <typename T>
void gather_strided(const GatherStrided& a, int64_t begin, int64_t end) {
  const int64_t channels = a.hidden_channels + a.skip_channels;
  for (int64_t line = begin; line < end; ++line) {
    const int64_t y = line % a.height;
    const int64_t c = line / a.height % channels;
    const int64_t b = line / a.height / channels;
    T* out = static_cast<T*>(a.out_ptr) + b * a.out_strides[0] + c * a.out_strides[1] + y * a.out_strides[2];
    if (c < a.hidden_channels) {
      const T* hidden = static_cast<const T*>(a.hidden_ptr) + b * a.hidden_strides[0] + c * a.hidden_strides[1] +
                        y * a.hidden_strides[2];
      for (int64_t x = 0; x < a.width; ++x) out[x * a.out_strides[3]] = hidden[x * a.hidden_strides[3]];
      continue;
    }
    const int64_t row = a.rows_ptr ? a.rows_ptr[b] : b;
    const int64_t k = c - a.hidden_channels;
    const T* skip = static_cast<const T*>(a.skip_ptr) + row * a.skip_strides[0] + k * a.skip_strides[1] +
                    y * a.skip_strides[2];
    if (!a.residual_ptr) {
      for (int64_t x = 0; x < a.width; ++x) out[x * a.out_strides[3]] = skip[x * a.skip_strides[3]];
      continue;
    }
    const T* residual = static_cast<const T*>(a.residual_ptr) + row * a.residual_strides[0] +
                        k * a.residual_strides[1] + y * a.residual_strides[2];
    for (int64_t x = 0; x < a.width; ++x) {
      out[x * a.out_strides[3]] = blend(skip[x * a.skip_strides[3]], residual[x * a.residual_strides[3]], a.scale);
    }
  }
}

template <typename T>
void pack_values(const PackValues& a, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / a.heads;
    const int64_t h = item % a.heads;
    const T* v = static_cast<const T*>(a.v_ptr) + b * a.strides[0] + h * a.strides[2];
    float* values = a.values_ptr + item * a.s_kv * a.padded_size;
    for (int64_t k = 0; k < a.s_kv; ++k) {
      for (int64_t d = 0; d < a.size; ++d) values[d] = to_float(v[k * a.strides[1] + d * a.strides[3]]);
      for (int64_t d = a.size; d < a.padded_size; ++d) values[d] = 0.f;
      values += a.padded_size;
    }
  }
}

template <typename M>
constexpr float kStoredScale = 1.f;
template <>
constexpr float kStoredScale<E4m3> = 1.f / 448.f;

// One stored row into fp32 weights that sum to one: slot 0 becomes 1 - sum of the others (the complement form).
template <typename M>
HGC_INLINE void decode_row(const M* stored, float* weights, int64_t s_kv) {
  const Vec scale = broadcast(kStoredScale<M>);
  Vec sums = broadcast(0.f);
  int64_t k = 1;
  // Stored rows are padded to 16 slots, but only the s_kv first count: the rest may hold anything.
  for (; k + Vec::kWidth <= s_kv; k += Vec::kWidth) {
    const Vec p = mul(load(stored + k), scale);
    store(weights + k, p);
    sums = add(sums, p);
  }
  float total = sum(sums);
  for (; k < s_kv; ++k) {
    weights[k] = to_float(stored[k]) * kStoredScale<M>;
    total += weights[k];
  }
  weights[0] = 1.f - total;
}

#if defined(__AVX512F__)
constexpr int kRows = 6;
constexpr int kMaxVectors = 4;
#elif defined(__AVX2__)
constexpr int kRows = 4;
constexpr int kMaxVectors = 3;
#else
constexpr int kRows = 4;
constexpr int kMaxVectors = 2;
#endif
static_assert(kQueryBlock % kRows == 0, "a block of queries is whole tiles");

// out[r, :] = sum_k weights[r, k] values[k, :] for kRows rows and kVectors vectors of columns.
template <int kVectors>
HGC_INLINE void tile(const float* weights, int64_t weight_stride, const float* values, int64_t value_stride,
                     int64_t s_kv, Vec (&acc)[kRows][kVectors]) {
  for (int r = 0; r < kRows; ++r) {
    for (int n = 0; n < kVectors; ++n) acc[r][n] = broadcast(0.f);
  }
  for (int64_t k = 0; k < s_kv; ++k) {
    Vec value[kVectors];
    for (int n = 0; n < kVectors; ++n) value[n] = load(values + k * value_stride + n * Vec::kWidth);
    for (int r = 0; r < kRows; ++r) {
      const Vec weight = broadcast(weights[r * weight_stride + k]);
      for (int n = 0; n < kVectors; ++n) acc[r][n] = fma(weight, value[n], acc[r][n]);
    }
  }
}

template <typename T, int kVectors>
void write_tile(const float* weights, const float* values, const ApplyMap& a, T* out, int64_t rows, int64_t column) {
  Vec acc[kRows][kVectors];
  tile<kVectors>(weights, a.padded_s_kv, values + column, a.padded_size, a.s_kv, acc);
  for (int64_t r = 0; r < rows; ++r) {
    T* line = out + r * a.heads * a.size;
    for (int n = 0; n < kVectors; ++n) {
      const int64_t d = column + n * Vec::kWidth;
      if (d + Vec::kWidth <= a.size) {
        store(line + d, acc[r][n]);
      } else {
        T last[Vec::kWidth];
        store(last, acc[r][n]);
        for (int64_t j = 0; d + j < a.size; ++j) line[d + j] = last[j];
      }
    }
  }
}

template <typename M, typename T>
bool apply_map(const ApplyMap& a, int64_t begin, int64_t end) {
  float* weights = static_cast<float*>(calloc(kRows * a.padded_s_kv, sizeof(float)));
  if (!weights) return false;
  const int64_t blocks = (a.s_q + kQueryBlock - 1) / kQueryBlock;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / blocks;
    const int64_t first = item % blocks * kQueryBlock;
    const int64_t last = first + kQueryBlock < a.s_q ? first + kQueryBlock : a.s_q;
    // Heads inside, so that the map, which is far larger than the values, is read in the order it lies in memory.
    for (int64_t q = first; q < last; q += kRows) {
      const int64_t rows = last - q < kRows ? last - q : kRows;
      for (int64_t h = 0; h < a.heads; ++h) {
        const M* stored = static_cast<const M*>(a.map_ptr) + ((b * a.s_q + q) * a.heads + h) * a.padded_s_kv;
        for (int64_t r = 0; r < rows; ++r) {
          decode_row(stored + r * a.heads * a.padded_s_kv, weights + r * a.padded_s_kv, a.s_kv);
        }
        const float* values = a.values_ptr + (b * a.heads + h) * a.s_kv * a.padded_size;
        T* out = static_cast<T*>(a.out_ptr) + ((b * a.s_q + q) * a.heads + h) * a.size;
        int64_t column = 0;
        while (column < a.size) {
          const int64_t vectors = (a.size - column + Vec::kWidth - 1) / Vec::kWidth;
          const int64_t step = vectors < kMaxVectors ? vectors : kMaxVectors;
          if (step == 1) write_tile<T, 1>(weights, values, a, out, rows, column);
          if (step == 2) write_tile<T, 2>(weights, values, a, out, rows, column);
          if constexpr (kMaxVectors >= 3) {
            if (step == 3) write_tile<T, 3>(weights, values, a, out, rows, column);
          }
          if constexpr (kMaxVectors >= 4) {
            if (step == 4) write_tile<T, 4>(weights, values, a, out, rows, column);
          }
          column += step * Vec::kWidth;
        }
      }
    }
  }
  free(weights);
  return true;
}

void gather_dense_any(const GatherDense& a, Element element, int64_t begin, int64_t end) {
  if (element == Element::kFloat) gather_dense<float>(a, begin, end);
  if (element == Element::kHalf) gather_dense<Half>(a, begin, end);
  if (element == Element::kBFloat) gather_dense<BFloat>(a, begin, end);
}

void gather_strided_any(const GatherStrided& a, Element element, int64_t begin, int64_t end) {
  if (element == Element::kFloat) gather_strided<float>(a, begin, end);
  if (element == Element::kHalf) gather_strided<Half>(a, begin, end);
  if (element == Element::kBFloat) gather_strided<BFloat>(a, begin, end);
}

void pack_values_any(const PackValues& a, Element element, int64_t begin, int64_t end) {
  if (element == Element::kFloat) pack_values<float>(a, begin, end);
  if (element == Element::kHalf) pack_values<Half>(a, begin, end);
  if (element == Element::kBFloat) pack_values<BFloat>(a, begin, end);
}

template <typename M>
bool apply_map_out(const ApplyMap& a, Element out, int64_t begin, int64_t end) {
  if (out == Element::kFloat) return apply_map<M, float>(a, begin, end);
  if (out == Element::kHalf) return apply_map<M, Half>(a, begin, end);
  return apply_map<M, BFloat>(a, begin, end);
}

bool apply_map_any(const ApplyMap& a, Element map, Element out, int64_t begin, int64_t end) {
  if (map == Element::kFloat) return apply_map_out<float>(a, out, begin, end);
  if (map == Element::kHalf) return apply_map_out<Half>(a, out, begin, end);
  if (map == Element::kBFloat) return apply_map_out<BFloat>(a, out, begin, end);
  return apply_map_out<E4m3>(a, out, begin, end);
}

}  // namespace

#define HGC_NAME_(x) #x
#define HGC_NAME(x) HGC_NAME_(x)
const Kernels kTable = {HGC_NAME(HGC_ISA), gather_dense_any, gather_strided_any, apply_map_any, pack_values_any};

}  // namespace hgc::cpu::HGC_ISA
