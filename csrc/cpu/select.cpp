// Picks the kernels for the processor this runs on. Compiled for any processor.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace hgc::cpu {
namespace {

bool has_avx2() {
#if defined(HGC_X86)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

bool has_avx512() {
#if defined(HGC_X86)
  __builtin_cpu_init();
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

const Kernels& pick() {
#if defined(HGC_X86)
  const char* wish = std::getenv("HGC_CPU_ISA");
  const bool any = !wish || !*wish;
  if (has_avx512() && __builtin_cpu_supports("avx512bf16") &&
      (any || !std::strcmp(wish, "avx512_bf16"))) {
    return avx512_bf16::kTable;
  }
  if (has_avx512() && (any || !std::strcmp(wish, "avx512"))) return avx512::kTable;
  if (has_avx2() && (any || !std::strcmp(wish, "avx2"))) return avx2::kTable;
#endif
  return baseline::kTable;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& table = pick();
  return table;
}

}  // namespace hgc::cpu
