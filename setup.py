"""Build the optional C++ kernels with CMake; without a compiler the package installs without them.

The outcome, good or bad, is written to mts_fast/_build.json, which `mts-fast doctor` reads.
MTS_FAST_CPP=0 skips the build, MTS_FAST_CPP=1 makes a failed build an error.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Run CMake once for the whole extension and record what happened."""

    def run(self) -> None:
        package = ROOT if self.inplace else Path(self.build_lib).resolve()
        package = package / "mts_fast"
        package.mkdir(parents=True, exist_ok=True)
        wanted = os.environ.get("MTS_FAST_CPP", "auto")
        if wanted == "0":
            record = {"built": False, "reason": "MTS_FAST_CPP=0 was set when the package was built"}
        else:
            record = self.build(package)
        if wanted == "1" and not record["built"]:
            raise SystemExit(f"mts_fast: MTS_FAST_CPP=1, but {record['reason']}")
        if not record["built"]:
            for stale in [*package.glob("_C*.so"), *package.glob("libmts_fast_ops.so")]:
                stale.unlink()
            print(f"mts_fast: built without C++ kernels: {record['reason']}", file=sys.stderr)
        (package / "_build.json").write_text(json.dumps(record, indent=1) + "\n")

    def build(self, package: Path) -> dict:
        try:
            import pybind11
            import torch
            from torch.utils.cpp_extension import include_paths
        except ImportError as error:
            return {
                "built": False,
                "reason": f"{error} at build time; install torch and pybind11 first, then "
                "`pip install --no-build-isolation .`",
            }
        with tempfile.TemporaryDirectory() as work:
            configure = [
                "cmake", "-S", str(ROOT), "-B", work, "-G", "Ninja",
                "-DCMAKE_BUILD_TYPE=Release",
                f"-DCMAKE_INSTALL_PREFIX={package}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DMTS_FAST_VERSION={self.distribution.get_version()}",
                f"-DTORCH_INCLUDE={';'.join(include_paths())}",
                f"-DTORCH_LIB={Path(torch.__file__).parent / 'lib'}",
                f"-DTORCH_VERSION={torch.__version__}",
            ]  # fmt: skip
            # the virtual environment's cmake and ninja come first even where it is not activated.
            path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
            for command in (configure, ["cmake", "--build", work], ["cmake", "--install", work]):
                try:
                    subprocess.run(
                        command,
                        check=True,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.STDOUT,
                        text=True,
                        env={**os.environ, "PATH": path},
                    )
                except FileNotFoundError:
                    return {"built": False, "reason": f"`{command[0]}` was not found"}
                except subprocess.CalledProcessError as error:
                    tail = " | ".join(error.stdout.strip().splitlines()[-8:])
                    return {"built": False, "reason": f"`{' '.join(command[:2])}` failed: {tail}"}
        return {"built": True, "reason": ""}

    def get_outputs(self) -> list[str]:
        return []


setup(ext_modules=[Extension("mts_fast._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
