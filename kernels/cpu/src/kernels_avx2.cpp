#define STAFFETTA_ISA isa_avx2
#include "vec_avx2.h"
#include "kernels.h"

const Kernels kernels_avx2 = STAFFETTA_ISA::table();
