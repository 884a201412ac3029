// Begins NAME.simd.cpp, which is compiled with the others, and once more for each SIMD level: then with
// ISOBIT_LEVEL, for the functions of that level.
#ifdef ISOBIT_LEVEL
#include "../kernels/level.h"
namespace isobit {
using namespace ISOBIT_SIMD;
}
#else
#include "engine.h"
#endif
