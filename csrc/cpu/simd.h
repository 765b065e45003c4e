// A vector of fp32 lanes and its loads and stores, for the instruction set that this file is
// compiled for. Everything is in an anonymous namespace: the same source is compiled several times
// and the copies must not be merged.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define HGC_INLINE inline __attribute__((always_inline))

namespace {

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};
struct E4m3 {
  uint8_t bits;
};

HGC_INLINE float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
HGC_INLINE uint32_t bits_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

HGC_INLINE float to_float(float x) { return x; }
HGC_INLINE float to_float(BFloat x) { return float_of_bits(static_cast<uint32_t>(x.bits) << 16); }
HGC_INLINE float to_float(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude < 0x0400u) {  // subnormal: a multiple of 2^-24
    return float_of_bits(sign | bits_of_float(static_cast<float>(magnitude) * 0x1p-24f));
  }
  const uint32_t rebias = magnitude >= 0x7c00u ? (255u - 31u) << 23 : (127u - 15u) << 23;
  return float_of_bits(sign | ((magnitude << 13) + rebias));
}
HGC_INLINE float to_float(E4m3 x) {
  if ((x.bits & 0x7fu) == 0x7fu) return float_of_bits(0x7fc00000u);
  // An fp16 with the same fields is 2^-8 times as large, subnormals too.
  return to_float(Half{static_cast<uint16_t>((x.bits & 0x80u) << 8 | (x.bits & 0x7fu) << 7)}) *
         256.f;
}

template <typename T>
T from_float(float x);
template <>
HGC_INLINE float from_float<float>(float x) {
  return x;
}
template <>
HGC_INLINE BFloat from_float<BFloat>(float x) {
  const uint32_t bits = bits_of_float(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fc0u};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <>
HGC_INLINE Half from_float<Half>(float x) {
  const uint32_t bits = bits_of_float(x);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x47800000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65536 and more
  if (magnitude < 0x38800000u) {  // below 2^-14: at 0.5 an fp32 has steps of 2^-24, so the addition
                                  // rounds for us
    return {static_cast<uint16_t>(sign |
                                  (bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude - ((127u - 15u) << 23) + 0xfffu + ((magnitude >> 13) & 1u);
  return {static_cast<uint16_t>(sign | (rounded >> 13))};
}

#if defined(__AVX512F__)

struct Vec {
  static constexpr int kWidth = 16;
  __m512 v;
};
HGC_INLINE Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
HGC_INLINE Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
HGC_INLINE Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
HGC_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
HGC_INLINE float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
HGC_INLINE Vec widen(__m256i x, Half) { return {_mm512_cvtph_ps(x)}; }
HGC_INLINE Vec widen(__m256i x, BFloat) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))};
}
HGC_INLINE Vec widen(__m128i x, E4m3) {
  const __m256i wide = _mm256_cvtepu8_epi16(x);
  const __m256i magnitude = _mm256_and_si256(wide, _mm256_set1_epi16(0x7f));
  const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x80)), 8);
  const __m256i is_nan = _mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x7f));
  __m256i half = _mm256_or_si256(sign, _mm256_slli_epi16(magnitude, 7));
  half = _mm256_or_si256(half, _mm256_and_si256(is_nan, _mm256_set1_epi16(0x7e00)));
  return {_mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256.f))};
}
HGC_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
HGC_INLINE Vec load(const E4m3* p) {
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), E4m3{});
}
template <typename T>
HGC_INLINE Vec load(const T* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T{});
}
// Lanes [from, to) of what load would give, zero in the others.
HGC_INLINE __mmask16 lanes(int64_t from, int64_t to) {
  return static_cast<__mmask16>(((1u << to) - 1u) & ~((1u << from) - 1u));
}
HGC_INLINE Vec load_lanes(const float* p, int64_t from, int64_t to) {
  return {_mm512_maskz_loadu_ps(lanes(from, to), p)};
}
HGC_INLINE Vec load_lanes(const E4m3* p, int64_t from, int64_t to) {
  return widen(_mm_maskz_loadu_epi8(lanes(from, to), p), E4m3{});
}
template <typename T>
HGC_INLINE Vec load_lanes(const T* p, int64_t from, int64_t to) {
  return widen(_mm256_maskz_loadu_epi16(lanes(from, to), p), T{});
}
HGC_INLINE __m256i narrow(Vec a, BFloat) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}
HGC_INLINE __m256i narrow(Vec a, Half) {
  return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
HGC_INLINE Vec round_to(Vec a, float) { return a; }
HGC_INLINE Vec round_to(Vec a, Half) { return {_mm512_cvtph_ps(narrow(a, Half{}))}; }
HGC_INLINE Vec round_to(Vec a, BFloat) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow(a, BFloat{})), 16))};
}
HGC_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
template <typename T>
HGC_INLINE void store(T* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a, T{}));
}
// A cache line at a time: what a streaming store needs to leave nothing half written.
constexpr int64_t kLineBytes = 64;
HGC_INLINE void stream_line(float* p, const Vec* a) { _mm512_stream_ps(p, a[0].v); }
template <typename T>
HGC_INLINE void stream_line(T* p, const Vec* a) {
  const __m512i low = _mm512_castsi256_si512(narrow(a[0], T{}));
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), _mm512_inserti64x4(low, narrow(a[1], T{}), 1));
}
HGC_INLINE void copy_line(void* to, const void* from) {
  _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_loadu_si512(from));
}
HGC_INLINE void stream_fence() { _mm_sfence(); }

#elif defined(__AVX2__)

struct Vec {
  static constexpr int kWidth = 8;
  __m256 v;
};
HGC_INLINE Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
HGC_INLINE Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
HGC_INLINE Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
HGC_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
HGC_INLINE float sum(Vec a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}
HGC_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
HGC_INLINE Vec load(const Half* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
HGC_INLINE Vec load(const BFloat* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}
HGC_INLINE Vec load(const E4m3* p) {
  const __m128i wide = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  const __m128i magnitude = _mm_and_si128(wide, _mm_set1_epi16(0x7f));
  const __m128i sign = _mm_slli_epi16(_mm_and_si128(wide, _mm_set1_epi16(0x80)), 8);
  const __m128i is_nan = _mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x7f));
  __m128i half = _mm_or_si128(sign, _mm_slli_epi16(magnitude, 7));
  half = _mm_or_si128(half, _mm_and_si128(is_nan, _mm_set1_epi16(0x7e00)));
  return {_mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(256.f))};
}
HGC_INLINE __m128i narrow(Vec a, BFloat) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
  const __m256 is_nan = _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q);
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), _mm256_castps_si256(is_nan));
  rounded = _mm256_srli_epi32(rounded, 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}
HGC_INLINE __m128i narrow(Vec a, Half) {
  return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
HGC_INLINE Vec round_to(Vec a, float) { return a; }
HGC_INLINE Vec round_to(Vec a, Half) { return {_mm256_cvtph_ps(narrow(a, Half{}))}; }
HGC_INLINE Vec round_to(Vec a, BFloat) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow(a, BFloat{})), 16))};
}
HGC_INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
template <typename T>
HGC_INLINE void store(T* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(a, T{}));
}
constexpr int64_t kLineBytes = 64;
HGC_INLINE void stream_line(float* p, const Vec* a) {
  _mm256_stream_ps(p, a[0].v);
  _mm256_stream_ps(p + 8, a[1].v);
}
template <typename T>
HGC_INLINE void stream_line(T* p, const Vec* a) {
  for (int i = 0; i < 4; ++i)
    _mm_stream_si128(reinterpret_cast<__m128i*>(p) + i, narrow(a[i], T{}));
}
HGC_INLINE void copy_line(void* to, const void* from) {
  const __m256i* source = static_cast<const __m256i*>(from);
  _mm256_stream_si256(static_cast<__m256i*>(to), _mm256_loadu_si256(source));
  _mm256_stream_si256(static_cast<__m256i*>(to) + 1, _mm256_loadu_si256(source + 1));
}
HGC_INLINE void stream_fence() { _mm_sfence(); }

#else

struct Vec {
  static constexpr int kWidth = 4;
  float v[4];
};
HGC_INLINE Vec broadcast(float x) { return {{x, x, x, x}}; }
HGC_INLINE Vec add(Vec a, Vec b) {
  for (int i = 0; i < 4; ++i) a.v[i] += b.v[i];
  return a;
}
HGC_INLINE Vec mul(Vec a, Vec b) {
  for (int i = 0; i < 4; ++i) a.v[i] *= b.v[i];
  return a;
}
HGC_INLINE Vec fma(Vec a, Vec b, Vec c) {
  for (int i = 0; i < 4; ++i) c.v[i] += a.v[i] * b.v[i];
  return c;
}
HGC_INLINE float sum(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
template <typename T>
HGC_INLINE Vec load(const T* p) {
  return {{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
}
template <typename T>
HGC_INLINE Vec round_to(Vec a, T) {
  for (int i = 0; i < 4; ++i) a.v[i] = to_float(from_float<T>(a.v[i]));
  return a;
}
template <typename T>
HGC_INLINE void store(T* p, Vec a) {
  for (int i = 0; i < 4; ++i) p[i] = from_float<T>(a.v[i]);
}
// No streaming stores here: a line is written as any other memory.
constexpr int64_t kLineBytes = 64;
template <typename T>
HGC_INLINE void stream_line(T* p, const Vec* a) {
  for (size_t i = 0; i < kLineBytes / sizeof(T) / 4; ++i) store(p + 4 * i, a[i]);
}
HGC_INLINE void copy_line(void* to, const void* from) { memcpy(to, from, kLineBytes); }
HGC_INLINE void stream_fence() {}

#endif

#if !defined(__AVX512F__)
template <typename T>
HGC_INLINE Vec load_lanes(const T* p, int64_t from, int64_t to) {
  T some[Vec::kWidth] = {};
  for (int64_t i = from; i < to; ++i) some[i] = p[i];
  return load(some);
}
#endif

}  // namespace
