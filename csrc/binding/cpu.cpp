// torch.ops.hgc_native on CPU tensors: arguments in, pointers out.
#include <atomic>
#include <cstring>

#include "../cpu/kernels.h"
#include "arguments.h"
#include "build_info.h"

namespace hgc {
namespace {

using cpu::Element;
using cpu::kernels;

Element element_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return Element::kFloat;
    case ScalarType::Half:
      return Element::kHalf;
    case ScalarType::BFloat16:
      return Element::kBFloat;
    default:
      return Element::kE4m3;
  }
}

// rows as a dense list, each value checked.
class Rows {
 public:
  Rows(const Tensor& rows, int64_t bound) {
    const int64_t* from = static_cast<const int64_t*>(rows.const_data_ptr());
    const int64_t n = rows.size(0);
    values_.reset(new int64_t[n > 0 ? n : 1]);
    for (int64_t i = 0; i < n; ++i) {
      values_[i] = from[i * rows.stride(0)];
      STD_TORCH_CHECK(values_[i] >= 0 && values_[i] < bound, "rows: expected indices in [0, ",
                      bound, "), got ", values_[i]);
    }
  }
  const int64_t* get() const { return values_.get(); }

 private:
  std::unique_ptr<int64_t[]> values_;
};

// Bytes a thread should have to do, so that starting it pays.
constexpr int64_t kGrainBytes = 64 * 1024;
// A result that will not fit the caches is written past them: no line of it is read first, none of
// the inputs evicted.
constexpr int64_t kStreamBytes = 4 * 1024 * 1024;

Tensor gather_blocks(const Tensor& hidden, const Tensor& skip, std::optional<Tensor> residual,
                     std::optional<Tensor> rows, double scale) {
  const Gather g(hidden, skip, residual, rows);
  std::optional<Rows> row_list;
  if (rows) row_list.emplace(*rows, skip.size(0));
  Tensor out = g.new_result(hidden);
  const int64_t elements = out.numel();
  if (elements == 0) return out;
  const Element element = element_of(hidden.scalar_type());
  const int64_t element_bytes = out.element_size();
  const void* residual_ptr = residual ? residual->const_data_ptr() : nullptr;
  const int64_t* rows_ptr = row_list ? row_list->get() : nullptr;
  if (g.dense) {
    const int64_t pixels = g.height * g.width;
    const int64_t runs = g.channels_last ? pixels : 1;
    const cpu::GatherDense a{hidden.const_data_ptr(),
                             skip.const_data_ptr(),
                             residual_ptr,
                             rows_ptr,
                             out.mutable_data_ptr(),
                             runs,
                             g.hidden_channels * pixels / runs,
                             g.skip_channels * pixels / runs,
                             hidden.stride(0),
                             skip.stride(0),
                             residual ? residual->stride(0) : 0,
                             static_cast<float>(scale),
                             elements * element_bytes >= kStreamBytes};
    torch::stable::parallel_for(
        0, elements, kGrainBytes / element_bytes,
        [&](int64_t begin, int64_t end) { kernels().gather_dense(a, element, begin, end); });
    return out;
  }
  cpu::GatherStrided a{hidden.const_data_ptr(),
                       skip.const_data_ptr(),
                       residual_ptr,
                       rows_ptr,
                       out.mutable_data_ptr(),
                       g.hidden_channels,
                       g.skip_channels,
                       g.height,
                       g.width,
                       {},
                       {},
                       {},
                       {},
                       static_cast<float>(scale)};
  for (int d = 0; d < 4; ++d) {
    a.hidden_strides[d] = hidden.stride(d);
    a.skip_strides[d] = skip.stride(d);
    a.residual_strides[d] = residual ? residual->stride(d) : 0;
    a.out_strides[d] = out.stride(d);
  }
  const int64_t line_bytes = g.width * element_bytes;
  torch::stable::parallel_for(0, g.batch * (g.hidden_channels + g.skip_channels) * g.height,
                              kGrainBytes / 4 / line_bytes + 1, [&](int64_t begin, int64_t end) {
                                kernels().gather_strided(a, element, begin, end);
                              });
  return out;
}

// Copies elements [begin, end) of a row, counted in the order of the loops.
void copy_part(const RowLoops& loops, char* cache, const char* fresh, int64_t element_bytes,
               int64_t begin, int64_t end) {
  if (loops.is_run()) {
    std::memcpy(cache + begin * element_bytes, fresh + begin * element_bytes,
                (end - begin) * element_bytes);
    return;
  }
  int64_t index[RowLoops::kMaxDims];
  int64_t rest = begin;
  for (int d = loops.dims - 1; d >= 0; --d) {
    index[d] = rest % loops.sizes[d];
    rest /= loops.sizes[d];
  }
  for (int64_t i = begin; i < end; ++i) {
    int64_t to = 0;
    int64_t from = 0;
    for (int d = 0; d < loops.dims; ++d) {
      to += index[d] * loops.cache_strides[d];
      from += index[d] * loops.fresh_strides[d];
    }
    std::memcpy(cache + to * element_bytes, fresh + from * element_bytes, element_bytes);
    for (int d = loops.dims - 1; d >= 0 && ++index[d] == loops.sizes[d]; --d) index[d] = 0;
  }
}

void scatter_rows(const Tensor& cache, const Tensor& fresh, const Tensor& rows) {
  const RowLoops loops(cache, fresh);
  check_scatter(cache, fresh, rows);
  const Rows row_list(rows, cache.size(0));  // all checked before the first is written
  const int64_t count = rows.size(0);
  if (count == 0 || loops.elements == 0) return;
  const int64_t element_bytes = cache.element_size();
  char* cache_ptr = static_cast<char*>(cache.mutable_data_ptr());
  const char* fresh_ptr = static_cast<const char*>(fresh.const_data_ptr());
  const int64_t cache_row = cache.stride(0) * element_bytes;
  const int64_t fresh_row = fresh.stride(0) * element_bytes;
  torch::stable::parallel_for(
      0, count * loops.elements, kGrainBytes / element_bytes, [&](int64_t begin, int64_t end) {
        while (begin < end) {
          const int64_t sample = begin / loops.elements;
          const int64_t first = begin - sample * loops.elements;
          const int64_t n = std::min(end - begin, loops.elements - first);
          copy_part(loops, cache_ptr + row_list.get()[sample] * cache_row,
                    fresh_ptr + sample * fresh_row, element_bytes, first, first + n);
          begin += n;
        }
      });
}

Tensor apply_map(const Tensor& map, const Tensor& v) {
  STD_TORCH_CHECK(map.dim() == 4 && map.is_contiguous(),
                  "map: expected a contiguous tensor of 4 dimensions");
  STD_TORCH_CHECK(
      is_float_type(map.scalar_type()) || map.scalar_type() == ScalarType::Float8_e4m3fn,
      "map: expected float32, float16, bfloat16 or float8_e4m3fn");
  STD_TORCH_CHECK(v.dim() == 4, "v: expected 4 dimensions");
  STD_TORCH_CHECK(is_float_type(v.scalar_type()), "v: expected float32, float16 or bfloat16");
  STD_TORCH_CHECK(map.device() == v.device(), "map: expected the device of v");
  const int64_t batch = v.size(0);
  const int64_t s_kv = v.size(1);
  const int64_t heads = v.size(2);
  const int64_t size = v.size(3);
  const int64_t s_q = map.size(1);
  STD_TORCH_CHECK(s_kv >= 1, "v: expected at least one key");
  STD_TORCH_CHECK(map.size(0) == batch && map.size(2) == heads,
                  "map: expected the batch and heads of v");
  STD_TORCH_CHECK(map.size(3) == (s_kv + 15) / 16 * 16,
                  "map: expected a last size of S_kv padded to 16");
  const std::array<int64_t, 4> sizes{batch, s_q, heads, size};
  Tensor out =
      torch::stable::empty({sizes.data(), sizes.size()}, v.scalar_type(), std::nullopt, v.device());
  if (out.numel() == 0) return out;

  const int64_t padded_size = (size + cpu::kValuePad - 1) / cpu::kValuePad * cpu::kValuePad;
  const std::array<int64_t, 1> packed_size{batch * heads * cpu::packed_head(s_kv, padded_size)};
  Tensor values = torch::stable::empty({packed_size.data(), packed_size.size()}, ScalarType::Float,
                                       std::nullopt, v.device());
  float* values_ptr = static_cast<float*>(values.mutable_data_ptr());
  const cpu::PackValues pack{v.const_data_ptr(),
                             values_ptr,
                             heads,
                             s_kv,
                             size,
                             padded_size,
                             {v.stride(0), v.stride(1), v.stride(2), v.stride(3)}};
  const Element value_element = element_of(v.scalar_type());
  torch::stable::parallel_for(
      0, batch * heads, kGrainBytes / (s_kv * padded_size * 4) + 1,
      [&](int64_t begin, int64_t end) { kernels().pack_values(pack, value_element, begin, end); });

  const cpu::ApplyMap a{
      map.const_data_ptr(), values_ptr, out.mutable_data_ptr(), s_q, heads, s_kv, map.size(3), size,
      padded_size};
  const Element map_element = element_of(map.scalar_type());
  const int64_t blocks = (s_q + cpu::kQueryBlock - 1) / cpu::kQueryBlock;
  std::atomic<bool> done{true};
  torch::stable::parallel_for(0, batch * blocks, 1, [&](int64_t begin, int64_t end) {
    if (!kernels().apply_map(a, map_element, value_element, begin, end)) done = false;
  });
  STD_TORCH_CHECK(done, "apply_map: out of memory");
  return out;
}

}  // namespace
}  // namespace hgc

STABLE_TORCH_LIBRARY_IMPL(hgc_native, CPU, m) {
  m.impl("gather_blocks", TORCH_BOX(&hgc::gather_blocks));
  m.impl("scatter_rows", TORCH_BOX(&hgc::scatter_rows));
  m.impl("apply_map", TORCH_BOX(&hgc::apply_map));
}

extern "C" {
__attribute__((visibility("default"))) const char* hgc_build_info() { return HGC_BUILD_INFO; }
__attribute__((visibility("default"))) const char* hgc_cpu_isa() {
  return hgc::cpu::kernels().name;
}
}
