// What this binary was built with, reported by `mts-fast doctor`.
#pragma once

// Lines `name=value`: version (of the package), compiler, torch_version (whose headers were used),
// torch_target (the oldest torch that the stable ABI was asked for), cuda (of the toolkit; empty
// for a CPU build), isa (the instruction set that the CPU kernels use on this machine). A C
// function, so that a Python for which `_C` was not built can call it through ctypes.
extern "C" __attribute__((visibility("default"))) const char* mts_fast_build_info();
