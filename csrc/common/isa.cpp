// Which instruction set the CPU kernels use.
#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace mts_fast {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

Isa best_of_machine() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::baseline;
}

Isa chosen() {
  const Isa best = best_of_machine();
  const char* wanted = std::getenv("MTS_FAST_ISA");
  if (wanted == nullptr) return best;
  for (const Isa candidate : {Isa::baseline, Isa::avx2, Isa::avx512}) {
    const bool named = std::strcmp(wanted, kNames[static_cast<int>(candidate)]) == 0;
    if (named && candidate <= best) return candidate;
  }
  return best;
}

}  // namespace

Isa isa() {
  static const Isa selected = chosen();
  return selected;
}

const char* isa_name() { return kNames[static_cast<int>(isa())]; }

}  // namespace mts_fast
