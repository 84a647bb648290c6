// Compiles a loop once per instruction set: the same inlined body in three functions, one of which
// is chosen at run time. A macro, as the attribute cannot be a template parameter.
#pragma once

#include "../common/isa.h"

#define MTS_FAST_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__)
#define MTS_FAST_AVX2 __attribute__((target("avx2,fma")))
#define MTS_FAST_AVX512 __attribute__((target("avx512f")))

// Defines `name(args...)`, which calls `body(args...)` as compiled for this machine.
#define MTS_FAST_FOR_EVERY_ISA(name, body, parameters, arguments)                  \
  static void name##_baseline parameters { body arguments; }                       \
  MTS_FAST_AVX2 static void name##_avx2 parameters { body arguments; }             \
  MTS_FAST_AVX512 static void name##_avx512 parameters { body arguments; }         \
  void name parameters {                                                           \
    if (isa() == Isa::avx512) return name##_avx512 arguments;                      \
    return isa() == Isa::avx2 ? name##_avx2 arguments : name##_baseline arguments; \
  }
#else
#define MTS_FAST_FOR_EVERY_ISA(name, body, parameters, arguments) \
  void name parameters { body arguments; }
#endif
