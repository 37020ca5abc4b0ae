#define STAFFETTA_ISA isa_avx512
#include "vec_avx512.h"
#include "kernels.h"

const Kernels kernels_avx512 = STAFFETTA_ISA::table();
