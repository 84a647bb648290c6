// The Python module `mts_fast._C`: importing it loads the ops library; it knows no torch headers.
// Kernels are registered elsewhere: schemas in mts_fast/backends/cpp, implementations in csrc/ops.
#include <pybind11/pybind11.h>

#include "common/build_info.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "loads the C++ ops of mts_fast and reports how they were built";
  m.def("build_info", &mts_fast_build_info,
        "How this binary was built, as lines name=value: version, compiler, torch_version, "
        "torch_target, cuda (empty: none), and isa, the instruction set of its CPU kernels here.");
}
