// The CPU kernels: raw pointers in, nothing known of torch. One table of them an instruction set.
#pragma once

#include <cstdint>

namespace hgc::cpu {

enum class Element : int { kFloat, kHalf, kBFloat, kE4m3 };

// cat(hidden, skip[rows] + scale * residual[rows]) over inputs whose samples are dense in one and
// the same order. In NCHW order a sample is one run of C * H * W elements; in channels_last order
// it is H * W runs of C elements.
struct GatherDense {
  const void* hidden_ptr;
  const void* skip_ptr;
  const void* residual_ptr;  // may be null
  const int64_t* rows_ptr;   // may be null; every value in [0, N)
  void* out_ptr;             // dense
  int64_t runs_per_sample;
  int64_t hidden_run;  // elements a run
  int64_t skip_run;
  int64_t hidden_stride;  // elements from sample to sample
  int64_t skip_stride;
  int64_t residual_stride;
  float scale;
  bool stream;  // write past the caches: the result is larger than they are
};

// The same over inputs of any strides, a line of W elements at a time.
struct GatherStrided {
  const void* hidden_ptr;
  const void* skip_ptr;
  const void* residual_ptr;
  const int64_t* rows_ptr;
  void* out_ptr;
  int64_t hidden_channels, skip_channels, height, width;
  int64_t hidden_strides[4], skip_strides[4], residual_strides[4], out_strides[4];
  float scale;
};

// values: of every (b, h) packed_head floats, laid out by pack_values as its instruction set likes
// them. map: [B, S_q, H, padded_s_kv]. out: [B, S_q, H, size].
struct ApplyMap {
  const void* map_ptr;
  const float* values_ptr;
  void* out_ptr;
  int64_t s_q, heads, s_kv, padded_s_kv, size, padded_size;
};

struct PackValues {
  const void* v_ptr;
  float* values_ptr;
  int64_t heads, s_kv, size, padded_size;
  int64_t strides[4];  // of v: [B, S_kv, H, D]
};

struct Kernels {
  const char* name;
  // Each works on items [begin, end) of its own: elements of the result, lines (b, c, y), blocks of
  // kQueryBlock queries (b, q / kQueryBlock), heads (b, h).
  void (*gather_dense)(const GatherDense&, Element, int64_t begin, int64_t end);
  void (*gather_strided)(const GatherStrided&, Element, int64_t begin, int64_t end);
  // Returns false where scratch memory could not be had.
  bool (*apply_map)(const ApplyMap&, Element map, Element out, int64_t begin, int64_t end);
  void (*pack_values)(const PackValues&, Element, int64_t begin, int64_t end);
};

// Queries that apply_map takes at a time; also the padding unit of packed values, in floats.
inline constexpr int64_t kQueryBlock = 24;
inline constexpr int64_t kValuePad = 16;

// Floats that the packed values of a head take: a row a key, and one more for a layout that keeps
// key 0 twice.
constexpr int64_t packed_head(int64_t s_kv, int64_t padded_size) {
  return (s_kv + 1) * padded_size;
}

// The best table that this processor runs. HGC_CPU_ISA=baseline|avx2|avx512|avx512_bf16 asks for a
// lesser one (tests).
const Kernels& kernels();

namespace baseline {
extern const Kernels kTable;
}
namespace avx2 {
extern const Kernels kTable;
}
namespace avx512 {
extern const Kernels kTable;
}
namespace avx512_bf16 {
extern const Kernels kTable;
}

}  // namespace hgc::cpu
