// The CPU kernels: raw pointers in, nothing known of torch. One table of them an instruction set.
#pragma once

#include <cstdint>

#include "../gather.h"

namespace hgc::cpu {

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
  // stream: write past the caches, for a result that is larger than they are.
  void (*gather_dense)(const GatherDense&, Element, bool stream, int64_t begin, int64_t end);
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
