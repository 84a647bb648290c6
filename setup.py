"""Build the optional C++ kernels with CMake; without a compiler the package installs without them.

The outcome, good or bad, is written to mts_fast/_build.json, which `mts-fast doctor` reads.
MTS_FAST_CPP=0 skips the build, MTS_FAST_CPP=1 makes a failed build an error. MTS_FAST_CUDA=0|1
leaves out or asks for the CUDA kernels; by default they are built where nvcc and torch have CUDA.
MTS_FAST_SANITIZE=1 builds with the address and undefined-behaviour sanitizers.

Where the build failed the record says what to install, and the build's own output goes to stderr.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


AGAIN = "then run `make setup` or `pip install --no-build-isolation .` again"
INSTALL_TOOLS = f"pip install cmake ninja, {AGAIN}"
INSTALL_COMPILER = (
    "install a C++20 compiler (on Debian `apt-get install g++`, with conda "
    f"`conda install gxx`) and leave CXX unset or let it name one, {AGAIN}"
)
INSTALL_NVCC = f"install the CUDA toolkit, or leave MTS_FAST_CUDA unset, {AGAIN}"
SEE_OUTPUT = (
    f"run `pip install -v --no-build-isolation .` to see all of its output, mend it, {AGAIN}"
)
# CMake's messages where a compiler is missing or cannot compile
NO_NVCC = re.compile("CMAKE_CUDA_COMPILER|CUDA compiler|find nvcc")
NO_COMPILER = re.compile(r"CMAKE_CXX_COMPILER|C\+\+ compiler|variable CXX")
# lines of a build's output that say why it failed
ERROR_LINE = re.compile(r"\berror\b|not found|FAILED", re.IGNORECASE)
LINES_SHOWN = 3


def switch(name: str, *values: str) -> str:
    """The value of an environment variable of the build, the last of `values` where it is unset."""
    value = os.environ.get(name) or values[-1]
    if value not in values:
        raise SystemExit(
            f"mts_fast: {name} must be {', '.join(values[:-1])} or {values[-1]}, got {value!r}; "
            "set it to one of these, or leave it unset"
        )
    return value


def cuda_choices() -> list[bool]:
    """With CUDA kernels or without, in the order in which to try: MTS_FAST_CUDA decides, else with
    them where nvcc and torch have CUDA, and without where that fails."""
    asked = switch("MTS_FAST_CUDA", "0", "1", "auto")
    if asked != "auto":
        return [asked == "1"]
    import torch

    return [True, False] if shutil.which("nvcc") and torch.version.cuda else [False]


def failure(command: str, output: str) -> str:
    """Why a command of the build failed, and what to do."""
    lines = [" ".join(line.split()) for line in output.splitlines() if line.strip()]
    causes = {NO_NVCC: INSTALL_NVCC, NO_COMPILER: INSTALL_COMPILER, ERROR_LINE: SEE_OUTPUT}
    for pattern, hint in causes.items():
        matches = []
        for index, line in enumerate(lines):
            if pattern.search(line):
                # CMake breaks "The C++ compiler NAME is not able to compile" over three lines
                more = 2 if line.endswith("compiler") else int(line.endswith(":"))
                matches.append(" ".join(lines[index : index + 1 + more]).rstrip("."))
        if matches:
            return f"`{command}` failed: {' | '.join(matches[:LINES_SHOWN])}; {hint}"
    return f"`{command}` failed: {' | '.join(lines[-LINES_SHOWN:])}; {SEE_OUTPUT}"


class CMakeBuild(build_ext):
    """Run CMake once for the whole extension and record what happened."""

    built = False

    def run(self) -> None:
        package = ROOT if self.inplace else Path(self.build_lib).resolve()
        package = package / "mts_fast"
        package.mkdir(parents=True, exist_ok=True)
        wanted = switch("MTS_FAST_CPP", "0", "1", "auto")
        cuda = switch("MTS_FAST_CUDA", "0", "1", "auto")
        switch("MTS_FAST_SANITIZE", "1", "0")
        if wanted == "0":
            reason = f"MTS_FAST_CPP=0 was set when the package was built; leave it unset, {AGAIN}"
            record = {"built": False, "reason": reason}
        else:
            record = self.build_with_or_without_cuda(package)
        for name, value in (("MTS_FAST_CPP", wanted), ("MTS_FAST_CUDA", cuda)):
            if value == "1" and not record["built"]:
                raise SystemExit(f"mts_fast: {name}=1, but {record['reason']}")
        if not record["built"]:
            for stale in [*package.glob("_C*.so"), *package.glob("libmts_fast_ops.so")]:
                stale.unlink()
            print(f"mts_fast: built without C++ kernels: {record['reason']}", file=sys.stderr)
        self.built = record["built"]
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
            reason = f"{error} at build time; pip install torch pybind11, {AGAIN}"
            return {"built": False, "reason": reason}
        return record

    def build(self, package: Path, *, cuda: bool) -> dict:
        import pybind11
        import torch
        from torch.utils.cpp_extension import include_paths

        sanitize = switch("MTS_FAST_SANITIZE", "1", "0") == "1"
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
                    reason = f"`{command[0]}` was not found; {INSTALL_TOOLS}"
                    return {"built": False, "reason": reason}
                except subprocess.CalledProcessError as error:
                    print(error.stdout, file=sys.stderr)
                    reason = failure(" ".join(command[:2]), error.stdout)
                    return {"built": False, "reason": reason}
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
    """One wheel for every Python 3: the ops library does not depend on the version, and where
    `_C` is of another one the library is loaded without `_C`. Without kernels it is pure, for
    every platform."""

    def get_tag(self) -> tuple[str, str, str]:
        # known after the build; bdist_wheel asks for the tag before it writes the wheel's record
        self.root_is_pure = not self.get_finalized_command("build_ext").built
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("mts_fast._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
)
