#define HGC_ISA avx512_bf16
#include "kernels_impl.h"
