// What this binary was built with; the values come from CMake.
#include "build_info.h"

namespace mts_fast {

const BuildInfo& build_info() {
  static constexpr BuildInfo info{MTS_FAST_VERSION, MTS_FAST_COMPILER, MTS_FAST_TORCH_VERSION,
                                  MTS_FAST_TORCH_TARGET, MTS_FAST_CUDA_VERSION};
  return info;
}

}  // namespace mts_fast
