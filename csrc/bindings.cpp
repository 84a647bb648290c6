// The Python module `mts_fast._C`: importing it loads the ops library; it knows no torch headers.
#include <pybind11/pybind11.h>

#include "common/build_info.h"
#include "common/isa.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "loads the C++ ops of mts_fast and reports how they were built";
  m.def(
      "build_info",
      [] {
        const mts_fast::BuildInfo& info = mts_fast::build_info();
        pybind11::dict out;
        out["version"] = info.version;
        out["compiler"] = info.compiler;
        out["torch_version"] = info.torch_version;
        out["torch_target"] = info.torch_target;
        out["cuda"] = info.cuda;
        out["isa"] = mts_fast::isa_name();
        return out;
      },
      "How this binary was built: version, compiler, torch_version, torch_target, cuda ('' = "
      "none), and isa, the instruction set that its CPU kernels use here.");
}
