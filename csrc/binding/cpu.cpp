// torch.ops.hgc_native on CPU tensors: arguments in, pointers out.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "../cpu/kernels.h"
#include "arguments.h"
#include "build_info.h"

namespace hgc {
namespace {

using cpu::kernels;

// Bytes a thread should have to do, so that starting it pays.
constexpr int64_t kGrainBytes = 64 * 1024;
// A result that will not fit the caches is written past them: no line of it is read first, none of
// the inputs evicted.
constexpr int64_t kStreamBytes = 4 * 1024 * 1024;

Tensor gather_blocks(const Tensor& hidden, const Tensor& skip, std::optional<Tensor> residual,
                     double scale) {
  const Gather g(hidden, skip, residual, scale);
  Tensor out = g.new_result(aoti_torch_device_type_cpu());
  const int64_t elements = g.elements();
  if (elements == 0) return out;
  void* out_ptr = out.mutable_data_ptr();
  const Element element = element_of(g.type);
  const int64_t element_bytes = g.type == ScalarType::Float ? 4 : 2;
  // For tests, as torch's `fill_uninitialized_memory`, which this allocation does not obey: NaN.
  static const bool poisoned = std::getenv("HGC_POISON") != nullptr;
  if (poisoned) std::memset(out_ptr, 0xff, elements * element_bytes);
  if (g.dense) {
    const GatherDense a = g.dense_arguments(out_ptr);
    const bool stream = elements * element_bytes >= kStreamBytes;
    const auto run = [&](int64_t begin, int64_t end) {
      kernels().gather_dense(a, element, stream, begin, end);
    };
    const int64_t grain = kGrainBytes / element_bytes;
    if (elements <= grain) {
      run(0, elements);
    } else {
      torch::stable::parallel_for(0, elements, grain, run);
    }
    return out;
  }
  const GatherStrided a = g.strided_arguments(out_ptr);
  const int64_t line_bytes = g.width * element_bytes;
  torch::stable::parallel_for(0, g.batch * (g.hidden_channels + g.skip_channels) * g.height,
                              kGrainBytes / 4 / line_bytes + 1, [&](int64_t begin, int64_t end) {
                                kernels().gather_strided(a, element, begin, end);
                              });
  return out;
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

constexpr char kRoutedGather[] = "hgc_routed::gather_blocks";
constexpr char kRoutedApply[] = "hgc_routed::apply_map";

}  // namespace
}  // namespace hgc

STABLE_TORCH_LIBRARY_IMPL(hgc, CPU, m) {
  m.impl("gather_blocks",
         &hgc::kernel_or_router<TORCH_BOX(&hgc::gather_blocks), hgc::kRoutedGather>);
  m.impl("apply_map", &hgc::kernel_or_router<TORCH_BOX(&hgc::apply_map), hgc::kRoutedApply>);
}

STABLE_TORCH_LIBRARY_IMPL(hgc_native, CPU, m) {
  m.impl("gather_blocks", TORCH_BOX(&hgc::gather_blocks));
  m.impl("apply_map", TORCH_BOX(&hgc::apply_map));
}

extern "C" {
__attribute__((visibility("default"))) void hgc_run_directly(int on) {
  hgc::runs_directly = on != 0;
}
__attribute__((visibility("default"))) const char* hgc_build_info() { return HGC_BUILD_INFO; }
__attribute__((visibility("default"))) const char* hgc_cpu_isa() {
  return hgc::cpu::kernels().name;
}
}
