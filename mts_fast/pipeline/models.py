"""Classifiers by name: timm, torchvision, transformers, a folder of transformers, or a function."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from mts_fast._check import describe, fail
from mts_fast.pipeline.checkpoints import checksum
from mts_fast.pipeline.data.findings import Findings, listed

Kind = Literal["image", "text"]
PACKAGES = ("timm", "torchvision", "transformers")
# what installs them
EXTRAS = {
    **dict.fromkeys(PACKAGES[:2], "pip install 'mts_fast[models]'"),
    "transformers": "pip install 'mts_fast[texts]'",
}
# under these a file may keep its state_dict
WRAPPERS = ("state_dict", "model_state_dict", "model")
HINT = (
    "name one of timm, torchvision or transformers (a prefix 'timm:' or 'transformers:' picks the"
    " package; without it, names of transformers are OWNER/NAME), a folder"
    " of transformers, or package.module:function, which is called with num_classes"
)


def build_model(name: str, kind: Kind, num_classes: int) -> nn.Module:
    """A new classifier of `num_classes` classes, its backbone's weights where a name implies them.

    Raises:
        ValueError: an unknown name, with the nearest one.
        ModuleNotFoundError: the package of the name is not installed.
        TypeError: a function that returns no module.
    """
    if Path(name).is_dir():
        return _of_transformers(name, kind, num_classes)
    package, colon, rest = name.partition(":")
    if colon and package in PACKAGES:
        return _of_package(package, rest, kind, num_classes)
    if colon:
        return _of_function(package, rest, num_classes)
    for package in PACKAGES:
        if importlib.util.find_spec(package) and _has(package, name):
            return _of_package(package, name, kind, num_classes)
    _no_name(name)


def check_model(name: str) -> None:
    """Refuse what can be no model before the data are read: no such package, module or function.

    Raises:
        ValueError, ModuleNotFoundError: as `build_model`.
    """
    package, colon, rest = name.partition(":")
    if Path(name).is_dir():
        return
    if colon and package not in PACKAGES:
        _factory(package, rest)
    elif colon:
        importlib.import_module(package)
    elif not any(importlib.util.find_spec(p) and _has(p, name) for p in PACKAGES):
        _no_name(name)


def _no_name(name: str) -> NoReturn:
    known = [n for p in PACKAGES[:2] if importlib.util.find_spec(p) for n in _names(p)]
    nearest = difflib.get_close_matches(name, known, n=1)
    module, dot, function = name.rpartition(".")
    if dot and "/" not in name:
        nearest = [f"{module}:{function}"]
    absent = [package for package in EXTRAS if not importlib.util.find_spec(package)]
    hint = f"did you mean {nearest[0]!r}? {HINT}" if nearest else HINT
    if absent and not nearest:
        extras = " or ".join(sorted({EXTRAS[p] for p in absent}))
        hint = f"{extras} where it is one of {' or '.join(absent)}, not installed here; or {hint}"
    fail(ValueError, "train", "--model", "a known name", repr(name), hint)


def model_key(name: str, model: nn.Module) -> str:
    """A hash of a new model: its tensors, its modules, the source of its function."""
    package, colon, function = name.partition(":")
    text = repr(model)
    if colon and package not in PACKAGES:
        source = inspect.getsourcefile(getattr(sys.modules[package], function))
        text += Path(source).read_text() if source and Path(source).is_file() else ""
    return checksum(text, dict(model.state_dict()))


def tell_batch_statistics(model: nn.Module, findings: Findings) -> None:
    """A remark where batches that are cut into parts are normalised part by part."""
    kind = torch.nn.modules.batchnorm._BatchNorm
    count = sum(isinstance(module, kind) for module in model.modules())
    if count:
        findings.remark(
            f"{count} BatchNorm layers normalise the samples of each rank by themselves: the result"
            " is not that of one process"
        )


def load_pretrained(model: nn.Module, path: str, findings: Findings) -> None:
    """Put the weights of a file into a model: .safetensors, or what torch.save wrote.

    The prefix of a wrapper before every name ("module." and the like) is left out, whatever it is.
    Tensors of other shapes, such as a classifier of other classes, stay as they were; what did not
    fit is told in remarks.

    Raises:
        ValueError: no such file, no weights in it, or none that fit.
    """
    state = _read_state(path)
    current = model.state_dict()
    prefix = _prefix(list(state), list(current))
    named = {key.removeprefix(prefix): value for key, value in state.items()}
    fitting = {k: v for k, v in named.items() if k in current and v.shape == current[k].shape}
    if not fitting:
        got = f"{len(state)} tensors of other names: {listed(sorted(state))}"
        hint = f"the model has {listed(sorted(current))}"
        fail(ValueError, "train", "--pretrained", "of this model", f"{path!r} with {got}", hint)
    for what, names in (
        ("of other shapes, left as they were", named.keys() & current.keys() - fitting.keys()),
        ("in the file alone", named.keys() - current.keys()),
        ("in the model alone, left as they were", current.keys() - named.keys()),
    ):
        if names:
            findings.remark(
                f"--pretrained {path!r}: {len(names)} tensors {what}: {listed(sorted(names))}"
            )
    model.load_state_dict({**current, **fitting})


def _of_package(package: str, name: str, kind: Kind, num_classes: int) -> nn.Module:
    if package == "transformers":
        return _of_transformers(name, kind, num_classes)
    module = importlib.import_module(package if package == "timm" else "torchvision.models")
    if package == "timm":
        return _module(name, module.create_model(name, num_classes=num_classes))
    return _module(name, module.get_model(name, num_classes=num_classes))


def _of_transformers(name: str, kind: Kind, num_classes: int) -> nn.Module:
    transformers = importlib.import_module("transformers")
    classes = {
        "image": "AutoModelForImageClassification",
        "text": "AutoModelForSequenceClassification",
    }
    automatic = getattr(transformers, classes[kind])
    try:
        with quiet(transformers):
            if Path(name).is_dir() and not any(Path(name).glob("*.safetensors")):
                config = transformers.AutoConfig.from_pretrained(name, num_labels=num_classes)
                return _module(name, automatic.from_config(config))
            return _module(
                name,
                automatic.from_pretrained(
                    name, num_labels=num_classes, ignore_mismatched_sizes=True
                ),
            )
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        fail(ValueError, "train", "--model", f"a {kind} model of transformers", first, HINT)


@contextmanager
def quiet(transformers: Any) -> Any:
    """Without the remarks on heads that are new, which they have to be."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


def _of_function(module_name: str, function: str, num_classes: int) -> nn.Module:
    name = f"{module_name}:{function}"
    factory = _factory(module_name, function)
    parameters = inspect.signature(factory).parameters.values()
    takes = any(p.name == "num_classes" or p.kind is p.VAR_KEYWORD for p in parameters)
    return _module(name, factory(num_classes=num_classes) if takes else factory())


def _factory(module_name: str, function: str) -> Callable[..., object]:
    """The function that makes a model."""
    name = f"{module_name}:{function}"
    if "" not in sys.path:
        sys.path.insert(0, "")  # modules beside where the command was typed
    if not all(part.isidentifier() for part in module_name.removesuffix(".py").split(".")) or (
        module_name.endswith(".py")
    ):
        stem = Path(module_name.removesuffix(".py")).name
        hint = f"in the folder of the module, write it as {f'{stem}:{function}'!r}"
        fail(ValueError, "train", "--model", "package.module:function", repr(name), hint)
    try:
        factory: Callable[..., object] = getattr(importlib.import_module(module_name), function)
    except ImportError as error:
        hint = f"modules are looked for where the command is called, and on PYTHONPATH; {HINT}"
        fail(ValueError, "train", "--model", "importable", f"{name!r} ({error})", hint)
    except AttributeError:
        _no_function(module_name, function)
    if not callable(factory):
        _no_function(module_name, function)
    return factory


def _no_function(module_name: str, function: str) -> NoReturn:
    have = [n for n, value in vars(sys.modules[module_name]).items() if callable(value)]
    nearest = difflib.get_close_matches(function, have, n=1, cutoff=0)
    hint = f"did you mean {nearest[0]!r}?" if nearest else HINT
    fail(ValueError, "train", "--model", f"a function of {module_name}", repr(function), hint)


def _module(name: str, model: object) -> nn.Module:
    if not isinstance(model, nn.Module):
        hint = "return the classifier alone"
        fail(TypeError, "train", "--model", f"{name!r} returning a module", describe(model), hint)
    return model


def _names(package: str) -> list[str]:
    if package == "timm":
        return list(importlib.import_module("timm").list_models())
    return list(importlib.import_module("torchvision.models").list_models())


def _has(package: str, name: str) -> bool:
    # names of transformers are those of a hub or its cache: OWNER/NAME
    return "/" in name if package == "transformers" else name in _names(package)


def _read_state(path: str) -> dict[str, Tensor]:
    expected = "a file of weights"
    if not Path(path).is_file():
        fail(ValueError, "train", "--pretrained", expected, f"no file {path!r}", "check the path")
    hint = "pass .safetensors, or what torch.save(model.state_dict(), ...) wrote"
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever readers of damaged files raise
        first = (str(error) or type(error).__name__).splitlines()[0]
        fail(ValueError, "train", "--pretrained", expected, f"{path!r} ({first})", hint)
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    tensors = {}
    if isinstance(content, Mapping):
        tensors = {str(key): v for key, v in content.items() if isinstance(v, Tensor)}
    if not tensors:
        fail(ValueError, "train", "--pretrained", expected, f"{path!r} without tensors", hint)
    return tensors


def _prefix(names: list[str], wanted: list[str]) -> str:
    """What stands before most of the wanted names in a file."""
    known = {*wanted}
    counts: dict[str, int] = {"": sum(name in known for name in names)}
    for name in names:
        parts = name.split(".")
        for i in range(1, len(parts)):
            if ".".join(parts[i:]) in known:
                prefix = ".".join(parts[:i]) + "."
                counts[prefix] = counts.get(prefix, 0) + 1
    return max(counts, key=lambda prefix: (counts[prefix], -len(prefix)))
