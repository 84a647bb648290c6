// Which instruction set the CPU kernels use: chosen at run time, so that one binary serves all.
#pragma once

namespace mts_fast {

enum class Isa { baseline, avx2, avx512 };

// The best of this machine, or the one that the environment variable MTS_FAST_ISA names where the
// machine supports it. Read once.
Isa isa();

const char* isa_name();

}  // namespace mts_fast
