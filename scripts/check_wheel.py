"""Checks what a wheel of mts_fast must hold: files, tag, entry point, and what its kernels link.

    python scripts/check_wheel.py dist/*.whl    # prints every fault; status 1 where there is one

`make dist` runs it. The wheel is compared with the checkout that this script lies in.
"""

import io
import json
import re
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENTRY_POINT = "mts-fast = mts_fast_command:main"
LIBRARY = "mts_fast/libmts_fast_ops.so"
# `_C` and the library; other libraries would be copies of somebody else's, such as torch's
LIBRARIES = re.compile(rf"{LIBRARY}|mts_fast/_C\.cpython-\d+-[\w-]+\.so")
TAGS = re.compile(r"py3-none-(linux|manylinux_\d+_\d+)_(x86_64|aarch64)")
PURE_TAG = "py3-none-any"
# torch's, which the user's torch has loaded, and those of a Linux system with a C++ program
LINKED = re.compile(
    r"libtorch(_cpu)?\.so|libc10\.so|libmts_fast_ops\.so"
    r"|(libstdc\+\+|libgcc_s|libm|libc|libdl|librt|libpthread|ld-linux-\S+)\.so\.\d"
)
# torch's C++ interface, which changes with its versions; the stable one consists of C functions
UNSTABLE = re.compile(r"_ZNK?(2at|3c10|5torch)")
# the wheel of a CPU build has 0.6 MB, CUDA kernels add machine code of two chips; a copy of torch
# would have hundreds
MOST_BYTES = 20_000_000


def faults(path: Path) -> list[str]:
    """Everything that is wrong with a wheel."""
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    libraries = [name for name in contents if ".so" in Path(name).suffixes]
    return [
        *_metadata_faults(path, contents, pure=not libraries),
        *_file_faults(contents, libraries),
        *(fault for name in libraries for fault in _link_faults(name, contents[name])),
    ]


def _metadata_faults(path: Path, contents: dict[str, bytes], *, pure: bool) -> list[str]:
    version = re.search(r'"(.*)"', (ROOT / "mts_fast" / "_version.py").read_text().split("=")[1])[1]
    folder = f"mts_fast-{version}.dist-info"
    if f"{folder}/METADATA" not in contents:
        return [f"no {folder}: another package or version"]
    metadata = Parser().parsestr(contents[f"{folder}/METADATA"].decode())
    record = Parser().parsestr(contents[f"{folder}/WHEEL"].decode())
    tag, tag_of_name = record["Tag"], path.stem.removeprefix(f"mts_fast-{version}-")
    entry_points = contents.get(f"{folder}/entry_points.txt", b"").decode()
    checks = {
        f"METADATA has version {metadata['Version']}": metadata["Version"] == version,
        f"tag {tag}": tag == PURE_TAG if pure else bool(TAGS.fullmatch(tag)),
        f"the file's name says {tag_of_name}, its record {tag}": tag == tag_of_name,
        f"Root-Is-Purelib is {record['Root-Is-Purelib']}": (record["Root-Is-Purelib"] == "true")
        == pure,
        f"no entry point {ENTRY_POINT}": ENTRY_POINT in entry_points.splitlines(),
        "no LICENSE": f"{folder}/licenses/LICENSE" in contents,
        "torch is not required": any(
            requirement.startswith("torch>=") for requirement in metadata.get_all("Requires-Dist")
        ),
    }
    return [fault for fault, right in checks.items() if not right]


def _file_faults(contents: dict[str, bytes], libraries: list[str]) -> list[str]:
    package = ROOT / "mts_fast"
    data = (*(package / "demo").glob("*.json"), *package.rglob("*.toml"), *package.rglob("*.j2"))
    sources = [*package.rglob("*.py"), *data]
    expected = {path.relative_to(ROOT).as_posix() for path in sources}
    expected |= {"mts_fast/py.typed", "mts_fast/_build.json", "mts_fast_command.py"}
    present = {name for name in contents if ".dist-info/" not in name and name not in libraries}
    missing = [f"lacks {name}" for name in sorted(expected - present)]
    more = [f"should not have {name}" for name in sorted(present - expected)]
    more += [f"should not have {name}" for name in libraries if not LIBRARIES.fullmatch(name)]
    size = sum(map(len, contents.values()))
    if size > MOST_BYTES:
        more.append(f"has {size} bytes")
    build = json.loads(contents.get("mts_fast/_build.json", b"{}"))
    if build.get("built") != (LIBRARY in libraries):
        more.append(f"_build.json says {build}, the libraries are {libraries}")
    if not build.get("built") and not build.get("reason"):
        more.append("_build.json does not say why there are no kernels")
    return missing + more


def _link_faults(name: str, content: bytes) -> list[str]:
    # a wheel without kernels is checked without this package
    from elftools.elf.elffile import ELFFile

    file = ELFFile(io.BytesIO(content))
    tags = list(file.get_section_by_name(".dynamic").iter_tags())
    linked = [tag.needed for tag in tags if tag.entry.d_tag == "DT_NEEDED"]
    searched = [tag.runpath for tag in tags if tag.entry.d_tag == "DT_RUNPATH"]
    symbols = file.get_section_by_name(".dynsym").iter_symbols()
    wanted = [symbol.name for symbol in symbols if symbol["st_shndx"] == "SHN_UNDEF"]
    wrong = [f"{name} links {other}" for other in linked if not LINKED.fullmatch(other)]
    if searched != ["$ORIGIN"]:
        wrong.append(f"{name} searches {searched} for libraries, not its own folder alone")
    unstable = [symbol for symbol in wanted if UNSTABLE.match(symbol)]
    if unstable:
        wrong.append(f"{name} needs the torch that it was built with: {', '.join(unstable[:3])}")
    return wrong


def main(paths: list[str]) -> int:
    """The command."""
    if not paths:
        print("check_wheel: no wheel was named; run make dist")
        return 2
    listed = {path: faults(Path(path)) for path in paths}
    for path, wrong in listed.items():
        print(f"{path}: {'ok' if not wrong else ''}", *(f"  {fault}" for fault in wrong), sep="\n")
    return int(any(listed.values()))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
