// The functions of one instruction set.

#include "native.h"

#define ENTRY(name, parameters, arguments) NATIVE(name),
extern "C" const Kernels NATIVE(kernels);
extern "C" const Kernels NATIVE(kernels) = {TEXT(ISA), GEMMAKIT_FUNCTIONS(ENTRY)};
