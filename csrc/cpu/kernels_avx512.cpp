#define HGC_ISA avx512
#include "kernels_impl.h"
