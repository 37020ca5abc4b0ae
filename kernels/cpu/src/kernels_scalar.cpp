#define STAFFETTA_ISA isa_scalar
#include "vec_scalar.h"
#include "kernels.h"

const Kernels kernels_scalar = STAFFETTA_ISA::table();
