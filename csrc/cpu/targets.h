// Compiles a loop once per instruction set: the same inlined body in three functions, one of which
// is chosen at run time. A macro, as the attribute cannot be a template parameter.
#pragma once

#include "../common/isa.h"

#define MTS_FAST_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__)
#define MTS_FAST_AVX2 __attribute__((target("avx2,fma")))
#define MTS_FAST_AVX512 __attribute__((target("avx512f")))

// Defines `name(args...)`, which calls `body(args...)` as compiled for this machine.
#define MTS_FAST_FOR_EVERY_ISA_RETURNING(result, name, body, parameters, arguments) \
  static result name##_baseline parameters { return body arguments; }               \
  MTS_FAST_AVX2 static result name##_avx2 parameters { return body arguments; }     \
  MTS_FAST_AVX512 static result name##_avx512 parameters { return body arguments; } \
  result name parameters {                                                          \
    if (isa() == Isa::avx512) return name##_avx512 arguments;                       \
    return isa() == Isa::avx2 ? name##_avx2 arguments : name##_baseline arguments;  \
  }
#else
#define MTS_FAST_FOR_EVERY_ISA_RETURNING(result, name, body, parameters, arguments) \
  result name parameters { return body arguments; }
#endif
#define MTS_FAST_FOR_EVERY_ISA(name, body, parameters, arguments) \
  MTS_FAST_FOR_EVERY_ISA_RETURNING(void, name, body, parameters, arguments)
