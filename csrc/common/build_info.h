// What this binary was built with, reported by `mts-fast doctor`.
#pragma once

namespace mts_fast {

struct BuildInfo {
  const char* version;        // package version
  const char* compiler;       // name and version
  const char* torch_version;  // torch whose headers were used
  const char* torch_target;   // oldest torch the stable ABI was asked for
  const char* cuda;           // CUDA toolkit version, or "" for a CPU build
};

const BuildInfo& build_info();

}  // namespace mts_fast
