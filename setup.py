"""Build the optional C++ kernels with CMake; without a compiler the package installs without them.

The outcome, good or bad, is written to mts_fast/_build.json, which `mts-fast doctor` reads.
MTS_FAST_CPP=0 skips the build, MTS_FAST_CPP=1 makes a failed build an error. MTS_FAST_CUDA=0|1
leaves out or asks for the CUDA kernels; by default they are built where nvcc and torch have CUDA.
MTS_FAST_SANITIZE=1 builds with the address and undefined-behaviour sanitizers.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def cuda_choices() -> list[bool]:
    """With CUDA kernels or without, in the order in which to try: MTS_FAST_CUDA decides, else with
    them where nvcc and torch have CUDA, and without where that fails."""
    asked = os.environ.get("MTS_FAST_CUDA", "auto")
    if asked not in ("0", "1", "auto"):
        raise SystemExit(f"mts_fast: MTS_FAST_CUDA must be 0, 1 or auto, got {asked!r}")
    if asked != "auto":
        return [asked == "1"]
    import torch

    return [True, False] if shutil.which("nvcc") and torch.version.cuda else [False]


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
            record = self.build_with_or_without_cuda(package)
        for name in ("MTS_FAST_CPP", "MTS_FAST_CUDA"):
            if os.environ.get(name) == "1" and not record["built"]:
                raise SystemExit(f"mts_fast: {name}=1, but {record['reason']}")
        if not record["built"]:
            for stale in [*package.glob("_C*.so"), *package.glob("libmts_fast_ops.so")]:
                stale.unlink()
            print(f"mts_fast: built without C++ kernels: {record['reason']}", file=sys.stderr)
        (package / "_build.json").write_text(json.dumps(record, indent=1) + "\n")

    def build_with_or_without_cuda(self, package: Path) -> dict:
        try:
            choices = cuda_choices()
            record = self.build(package, cuda=choices[0])
            if not record["built"] and len(choices) > 1:
                failure = record["reason"]
                record = self.build(package, cuda=choices[1])
                record["cuda_reason"] = failure
        except ImportError as error:
            reason = f"{error} at build time; install torch and pybind11 first, then "
            reason += "`pip install --no-build-isolation .`"
            return {"built": False, "reason": reason}
        return record

    def build(self, package: Path, *, cuda: bool) -> dict:
        import pybind11
        import torch
        from torch.utils.cpp_extension import include_paths

        sanitize = os.environ.get("MTS_FAST_SANITIZE") == "1"
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
                f"-DMTS_FAST_CUDA={'ON' if cuda else 'OFF'}",
                f"-DMTS_FAST_SANITIZE={'ON' if sanitize else 'OFF'}",
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
        version = self.distribution.get_version()
        return {
            "built": True,
            "reason": "",
            "version": version,
            "torch_version": torch.__version__,
        }

    def get_outputs(self) -> list[str]:
        return []


class Wheel(bdist_wheel):
    """One wheel for every Python 3: the ops library asks nothing of it, and where `_C` is of
    another Python the library is loaded without it."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("mts_fast._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
)
