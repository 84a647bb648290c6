// What this binary was built with; the values come from CMake.
#include "build_info.h"

#include <string>

#include "isa.h"

extern "C" const char* mts_fast_build_info() {
  static const std::string lines =
      std::string("version=" MTS_FAST_VERSION "\ncompiler=" MTS_FAST_COMPILER
                  "\ntorch_version=" MTS_FAST_TORCH_VERSION "\ntorch_target=" MTS_FAST_TORCH_TARGET
                  "\ncuda=" MTS_FAST_CUDA_VERSION "\nisa=") +
      mts_fast::isa_name();
  return lines.c_str();
}
