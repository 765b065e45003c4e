// The kernels, written once over simd.h. Included by one file an instruction set, which names it in
// HGC_ISA. No standard library templates here: their out-of-line copies would be compiled for this
// instruction set and could then be linked into code that runs on any processor.
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
  int64_t i =
      ((kLineBytes - reinterpret_cast<uintptr_t>(out) % kLineBytes) % kLineBytes) / sizeof(T);
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
    const int64_t head =
        ((kLineBytes - reinterpret_cast<uintptr_t>(out) % kLineBytes) % kLineBytes) / sizeof(T);
    for (; i < head; ++i) out[i] = blend(skip[i], residual[i], scale);
    for (; i + kLine <= n; i += kLine) {
      Vec line[kLine / Vec::kWidth];
      for (int64_t j = 0; j < kLine / Vec::kWidth; ++j) {
        line[j] = blend_vec(skip + i + j * Vec::kWidth, residual + i + j * Vec::kWidth, scale_vec);
      }
      stream_line(out + i, line);
    }
  }
  for (; i + Vec::kWidth <= n; i += Vec::kWidth)
    store(out + i, blend_vec(skip + i, residual + i, scale_vec));
  for (; i < n; ++i) out[i] = blend(skip[i], residual[i], scale);
}

template <typename T>
void gather_dense(const GatherDense& a, bool stream, int64_t begin, int64_t end) {
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
      const T* hidden =
          static_cast<const T*>(a.hidden_ptr) + sample * a.hidden_stride + within * a.hidden_run;
      copy_run(out + i, hidden + column, n, stream);
      i += n;
      column += n;
    }
    if (column < stop) {
      const int64_t n = stop - column;
      const int64_t offset = within * a.skip_run + (column - a.hidden_run);
      const T* skip = static_cast<const T*>(a.skip_ptr) + sample * a.skip_stride + offset;
      if (a.residual_ptr) {
        const T* residual =
            static_cast<const T*>(a.residual_ptr) + sample * a.residual_stride + offset;
        blend_run(out + i, skip, residual, a.scale, n, stream);
      } else {
        copy_run(out + i, skip, n, stream);
      }
      i += n;
    }
  }
  if (stream) stream_fence();
}

template <typename T>
void gather_strided(const GatherStrided& a, int64_t begin, int64_t end) {
  const int64_t channels = a.hidden_channels + a.skip_channels;
  for (int64_t line = begin; line < end; ++line) {
    const int64_t y = line % a.height;
    const int64_t c = line / a.height % channels;
    const int64_t b = line / a.height / channels;
    T* out = static_cast<T*>(a.out_ptr) + b * a.out_strides[0] + c * a.out_strides[1] +
             y * a.out_strides[2];
    if (c < a.hidden_channels) {
      const T* hidden = static_cast<const T*>(a.hidden_ptr) + b * a.hidden_strides[0] +
                        c * a.hidden_strides[1] + y * a.hidden_strides[2];
      for (int64_t x = 0; x < a.width; ++x)
        out[x * a.out_strides[3]] = hidden[x * a.hidden_strides[3]];
      continue;
    }
    const int64_t k = c - a.hidden_channels;
    const T* skip = static_cast<const T*>(a.skip_ptr) + b * a.skip_strides[0] +
                    k * a.skip_strides[1] + y * a.skip_strides[2];
    if (!a.residual_ptr) {
      for (int64_t x = 0; x < a.width; ++x) out[x * a.out_strides[3]] = skip[x * a.skip_strides[3]];
      continue;
    }
    const T* residual = static_cast<const T*>(a.residual_ptr) + b * a.residual_strides[0] +
                        k * a.residual_strides[1] + y * a.residual_strides[2];
    for (int64_t x = 0; x < a.width; ++x) {
      out[x * a.out_strides[3]] =
          blend(skip[x * a.skip_strides[3]], residual[x * a.residual_strides[3]], a.scale);
    }
  }
}

template <typename T>
void pack_values(const PackValues& a, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / a.heads;
    const int64_t h = item % a.heads;
    const T* v = static_cast<const T*>(a.v_ptr) + b * a.strides[0] + h * a.strides[2];
    float* values = a.values_ptr + item * packed_head(a.s_kv, a.padded_size);
    for (int64_t k = 0; k < a.s_kv; ++k) {
      const T* from = v + k * a.strides[1];
      int64_t d = 0;
      if (a.strides[3] == 1) {
        for (; d + Vec::kWidth <= a.size; d += Vec::kWidth) store(values + d, load(from + d));
      }
      for (; d < a.size; ++d) values[d] = to_float(from[d * a.strides[3]]);
      for (; d < a.padded_size; ++d) values[d] = 0.f;
      values += a.padded_size;
    }
  }
}

#if defined(__AVX512BF16__)
// For the bf16 dot product: keys two by two, then key 0 in fp32.
void pack_pairs(const PackValues& a, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / a.heads;
    const int64_t h = item % a.heads;
    const BFloat* v = static_cast<const BFloat*>(a.v_ptr) + b * a.strides[0] + h * a.strides[2];
    float* first = a.values_ptr + item * packed_head(a.s_kv, a.padded_size);
    uint32_t* pairs = reinterpret_cast<uint32_t*>(first + a.padded_size);
    for (int64_t d = 0; d < a.padded_size; ++d)
      first[d] = d < a.size ? to_float(v[d * a.strides[3]]) : 0.f;
    for (int64_t k = 0; k < a.s_kv; k += 2) {
      const BFloat* even = v + k * a.strides[1];
      const BFloat* odd = even + (k + 1 < a.s_kv ? a.strides[1] : 0);
      const uint32_t keep = k + 1 < a.s_kv ? 0xffff0000u : 0u;  // the last key may have no partner
      if (a.strides[3] == 1) {
        for (int64_t d = 0; d < a.size; ++d) {
          pairs[d] = even[d].bits | (static_cast<uint32_t>(odd[d].bits) << 16 & keep);
        }
      } else {
        for (int64_t d = 0; d < a.size; ++d) {
          const int64_t at = d * a.strides[3];
          pairs[d] = even[at].bits | (static_cast<uint32_t>(odd[at].bits) << 16 & keep);
        }
      }
      for (int64_t d = a.size; d < a.padded_size; ++d) pairs[d] = 0;
      pairs += a.padded_size;
    }
  }
}
#endif

template <typename M>
constexpr float kStoredScale = 1.f;
template <>
constexpr float kStoredScale<E4m3> = 1.f / 448.f;

// The probabilities of a stored row as weights of type W: zero in slot 0 and past the last key,
// whatever is stored there. Returns their sum, as W holds them.
template <typename M, typename W>
HGC_INLINE float decode_row(const M* stored, W* weights, int64_t s_kv) {
  const Vec scale = broadcast(kStoredScale<M>);
  Vec sums = broadcast(0.f);
  for (int64_t k = 0; k < s_kv; k += Vec::kWidth) {
    const int64_t from = k == 0;
    const int64_t to = s_kv - k < Vec::kWidth ? s_kv - k : Vec::kWidth;
    Vec p = from == 0 && to == Vec::kWidth ? load(stored + k) : load_lanes(stored + k, from, to);
    p = round_to(mul(p, scale), W{});
    store(weights + k, p);
    sums = add(sums, p);
  }
  return sum(sums);
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
HGC_INLINE void tile(const float* weights, int64_t weight_stride, const float* values,
                     int64_t value_stride, int64_t s_kv, Vec (&acc)[kRows][kVectors]) {
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
HGC_INLINE void write_tile(const Vec (&acc)[kRows][kVectors], const ApplyMap& a, T* out,
                           int64_t rows, int64_t column) {
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

// A tile of queries of one head against its values in fp32.
template <typename M, typename T>
struct FloatTile {
  float* weights;
  int64_t stride;

  static int64_t scratch(int64_t padded_s_kv) { return kRows * padded_s_kv; }
  FloatTile(float* memory, const ApplyMap& a) : weights(memory), stride(a.padded_s_kv) {}
  void decode(const M* stored, int64_t row, const ApplyMap& a) {
    float* to = weights + row * stride;
    to[0] = 1.f - decode_row(stored, to, a.s_kv);  // the complement form
  }
  template <int kVectors>
  void multiply(const float* values, const ApplyMap& a, T* out, int64_t rows, int64_t column) {
    Vec acc[kRows][kVectors];
    tile<kVectors>(weights, stride, values + column, a.padded_size, a.s_kv, acc);
    write_tile<T, kVectors>(acc, a, out, rows, column);
  }
};

#if defined(__AVX512BF16__)
HGC_INLINE __m512i load_pairs(const BFloat* p) { return _mm512_loadu_si512(p); }
HGC_INLINE __m512 dot_pairs(__m512 acc, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
}

// The same with bf16 products of keys two by two, as eager bf16 matrix products are computed here.
// Key 0 keeps its fp32 weight, 1 - the sum of the others as rounded.
template <typename M>
struct PairTile {
  BFloat* weights;
  int64_t stride;
  float first_weight[kRows];

  static int64_t scratch(int64_t padded_s_kv) { return kRows * padded_s_kv / 2; }
  PairTile(float* memory, const ApplyMap& a)
      : weights(reinterpret_cast<BFloat*>(memory)), stride(a.padded_s_kv) {}

  void decode(const M* stored, int64_t row, const ApplyMap& a) {
    first_weight[row] = 1.f - decode_row(stored, weights + row * stride, a.s_kv);
  }

  template <int kVectors>
  void multiply(const float* values, const ApplyMap& a, BFloat* out, int64_t rows, int64_t column) {
    const BFloat* pairs = reinterpret_cast<const BFloat*>(values + a.padded_size) + 2 * column;
    Vec acc[kRows][kVectors];
    for (int r = 0; r < kRows; ++r) {
      for (int n = 0; n < kVectors; ++n) {
        acc[r][n] = mul(broadcast(first_weight[r]), load(values + column + n * Vec::kWidth));
      }
    }
    for (int64_t k = 0; k < a.s_kv; k += 2) {
      __m512i value[kVectors];
      for (int n = 0; n < kVectors; ++n) value[n] = load_pairs(pairs + n * 2 * Vec::kWidth);
      for (int r = 0; r < kRows; ++r) {
        int32_t pair;
        memcpy(&pair, weights + r * stride + k, 4);
        const __m512i weight = _mm512_set1_epi32(pair);
        for (int n = 0; n < kVectors; ++n) acc[r][n].v = dot_pairs(acc[r][n].v, weight, value[n]);
      }
      pairs += 2 * a.padded_size;
    }
    write_tile<BFloat, kVectors>(acc, a, out, rows, column);
  }
};
#endif

template <typename M, typename T, typename Tile>
bool apply_map(const ApplyMap& a, int64_t begin, int64_t end) {
  float* memory = static_cast<float*>(calloc(Tile::scratch(a.padded_s_kv), sizeof(float)));
  if (!memory) return false;
  Tile tile(memory, a);
  const int64_t blocks = (a.s_q + kQueryBlock - 1) / kQueryBlock;
  const int64_t vectors = (a.size + Vec::kWidth - 1) / Vec::kWidth;
  // Columns in even parts: five vectors are three and two, not four and one.
  const int64_t parts = (vectors + kMaxVectors - 1) / kMaxVectors;
  const int64_t step = (vectors + parts - 1) / parts;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / blocks;
    const int64_t first = item % blocks * kQueryBlock;
    const int64_t last = first + kQueryBlock < a.s_q ? first + kQueryBlock : a.s_q;
    // Heads inside, so that the map, which is far larger than the values, is read in the order it
    // lies in memory.
    for (int64_t q = first; q < last; q += kRows) {
      const int64_t rows = last - q < kRows ? last - q : kRows;
      for (int64_t h = 0; h < a.heads; ++h) {
        const M* stored =
            static_cast<const M*>(a.map_ptr) + ((b * a.s_q + q) * a.heads + h) * a.padded_s_kv;
        for (int64_t r = 0; r < rows; ++r) tile.decode(stored + r * a.heads * a.padded_s_kv, r, a);
        // The next queries' rows lie right behind these: each head asks for its share of them,
        // early enough to hide the way from memory. A prefetch past the end of the map is no
        // access.
        const int64_t share = rows * a.padded_s_kv;
        const M* next = static_cast<const M*>(a.map_ptr) +
                        (b * a.s_q + q + rows) * a.heads * a.padded_s_kv + h * share;
        if (q + rows < a.s_q) {
          for (int64_t i = 0; i < share; i += 64 / sizeof(M)) __builtin_prefetch(next + i);
        }
        const float* values = a.values_ptr + (b * a.heads + h) * packed_head(a.s_kv, a.padded_size);
        T* out = static_cast<T*>(a.out_ptr) + ((b * a.s_q + q) * a.heads + h) * a.size;
        for (int64_t at = 0; at < vectors; at += step) {
          const int64_t column = at * Vec::kWidth;
          switch (vectors - at < step ? vectors - at : step) {
            case 1:
              tile.template multiply<1>(values, a, out, rows, column);
              break;
            case 2:
              tile.template multiply<2>(values, a, out, rows, column);
              break;
            case 3:
              if constexpr (kMaxVectors >= 3)
                tile.template multiply<3>(values, a, out, rows, column);
              break;
            case 4:
              if constexpr (kMaxVectors >= 4)
                tile.template multiply<4>(values, a, out, rows, column);
              break;
          }
        }
      }
    }
  }
  free(memory);
  return true;
}

void gather_dense_any(const GatherDense& a, Element element, bool stream, int64_t begin,
                      int64_t end) {
  if (element == Element::kFloat) gather_dense<float>(a, stream, begin, end);
  if (element == Element::kHalf) gather_dense<Half>(a, stream, begin, end);
  if (element == Element::kBFloat) gather_dense<BFloat>(a, stream, begin, end);
}

void gather_strided_any(const GatherStrided& a, Element element, int64_t begin, int64_t end) {
  if (element == Element::kFloat) gather_strided<float>(a, begin, end);
  if (element == Element::kHalf) gather_strided<Half>(a, begin, end);
  if (element == Element::kBFloat) gather_strided<BFloat>(a, begin, end);
}

void pack_values_any(const PackValues& a, Element element, int64_t begin, int64_t end) {
  if (element == Element::kFloat) pack_values<float>(a, begin, end);
  if (element == Element::kHalf) pack_values<Half>(a, begin, end);
#if defined(__AVX512BF16__)
  if (element == Element::kBFloat) pack_pairs(a, begin, end);
#else
  if (element == Element::kBFloat) pack_values<BFloat>(a, begin, end);
#endif
}

template <typename M>
bool apply_map_out(const ApplyMap& a, Element out, int64_t begin, int64_t end) {
  if (out == Element::kFloat) return apply_map<M, float, FloatTile<M, float>>(a, begin, end);
  if (out == Element::kHalf) return apply_map<M, Half, FloatTile<M, Half>>(a, begin, end);
#if defined(__AVX512BF16__)
  return apply_map<M, BFloat, PairTile<M>>(a, begin, end);
#else
  return apply_map<M, BFloat, FloatTile<M, BFloat>>(a, begin, end);
#endif
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
const Kernels kTable = {HGC_NAME(HGC_ISA), gather_dense_any, gather_strided_any, apply_map_any,
                        pack_values_any};

}  // namespace hgc::cpu::HGC_ISA
