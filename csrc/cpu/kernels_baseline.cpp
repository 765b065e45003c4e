#define HGC_ISA baseline
#include "kernels_impl.h"
