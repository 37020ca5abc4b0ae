#define STAFFETTA_ISA isa_avx512bf16
#define STAFFETTA_BF16_DOT
#include "vec_avx512.h"
#include "kernels.h"

const Kernels kernels_avx512bf16 = STAFFETTA_ISA::table();
