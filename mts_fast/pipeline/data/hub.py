"""Samples of a Hugging Face data set: saved to a folder, or by its name."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mts_fast.pipeline.data.findings import Findings, listed, tell_empty
from mts_fast.pipeline.data.folders import SPLITS
from mts_fast.pipeline.data.images import UnreadableImage
from mts_fast.pipeline.data.samples import Role, Samples, composed

PREFIX = "hf:"
# what save_to_disk leaves in a folder
MARKS = ("dataset_dict.json", "dataset_info.json")
IMAGE_COLUMNS = ("image", "img", "picture", "file")
LABEL_COLUMNS = ("label", "labels", "class", "fine_label")
GROUP_COLUMN = "group"


@dataclass(frozen=True)
class StoredImage:
    """The image file of a row: its bytes in the data set, or a file beside it."""

    dataset: Any
    column: str
    index: int

    def read_bytes(self) -> bytes:
        """The whole file.

        Raises:
            UnreadableImage: the row has none.
            OSError: it cannot be opened.
        """
        cell = self.dataset[self.index][self.column]
        if cell is None:
            raise UnreadableImage("the row has no image")
        content: bytes | None = cell["bytes"]
        return Path(cell["path"]).read_bytes() if content is None else content


def is_dataset(path: str) -> bool:
    """Whether a source is a data set of Hugging Face: hf:NAME, or a folder of save_to_disk."""
    place = Path(path).expanduser()
    return path.startswith(PREFIX) or any((place / mark).is_file() for mark in MARKS)


def read_dataset(
    role: Role, source: str, text_column: str | None, findings: Findings, *, skip_empty: bool
) -> Samples | None:
    """The samples of a split; None where they cannot be used, told in `findings`.

    Args:
        source: hf:NAME_OR_FOLDER[@CONFIGURATION][:SPLIT], or a folder of save_to_disk; without a
            split that of the role is taken.
        text_column: the column of texts; None: images.
        skip_empty: leave rows without a text out.
    """
    option = f"--{role} {source!r}"
    if importlib.util.find_spec("datasets") is None:
        findings.stop(f"{option} needs datasets", "pip install 'mts_fast[data]'")
        return None
    loaded = _load(option, source, findings)
    if loaded is None:
        return None
    split, dataset = _split(option, role, loaded, source, findings)
    if dataset is None:
        return None
    content = text_column or _image_column(dataset)
    label = next((name for name in LABEL_COLUMNS if name in dataset.column_names), None)
    for wanted, column in ((text_column or "of images", content), ("label", label)):
        if column is None or column not in dataset.column_names:
            columns = listed(dataset.column_names)
            findings.stop(f"{option} has no column {wanted}", f"name one of {columns} so")
            return None
    assert content is not None and label is not None
    return _samples(
        *(role, source, split, dataset, content, label, findings),
        of_texts=text_column is not None,
        skip_empty=skip_empty,
    )


def _load(option: str, source: str, findings: Findings) -> Any:
    datasets = importlib.import_module("datasets")
    name, configuration, _ = parts_of(source)
    place = Path(name).expanduser()
    try:
        if any((place / mark).is_file() for mark in MARKS):
            return datasets.load_from_disk(str(place))
        return datasets.load_dataset(name, configuration)
    except Exception as error:  # the hub, the network, builders of any format
        first = (str(error) or type(error).__name__).splitlines()[0]
        findings.stop(f"{option} cannot be loaded ({first})", "check its name, or the network")
        return None


def parts_of(source: str) -> tuple[str, str | None, str | None]:
    """(name or folder, configuration, split) of a source."""
    if not source.startswith(PREFIX):
        return source, None, None
    name, _, split = source.removeprefix(PREFIX).partition(":")
    name, _, configuration = name.partition("@")
    return name, configuration or None, split or None


def _split(
    option: str, role: Role, loaded: Any, source: str, findings: Findings
) -> tuple[str, Any]:
    """The name of the split and its rows; (..., None) where there is none that fits."""
    wanted = parts_of(source)[2]
    if not isinstance(loaded, dict):
        return str(wanted or loaded.split or role), loaded
    fitting = [wanted] if wanted else [word for word in SPLITS[role] if word in loaded]
    if not fitting or fitting[0] not in loaded:
        what = f"{option} has no split {wanted or ' or '.join(SPLITS[role])}"
        findings.stop(what, f"append one of {listed([':' + name for name in loaded])}")
        return "", None
    return str(fitting[0]), loaded[fitting[0]]


def _image_column(dataset: Any) -> str | None:
    """The column of images: by its type, else by its name."""
    for name, feature in dataset.features.items():
        if type(feature).__name__ == "Image":
            return str(name)
    return next((name for name in IMAGE_COLUMNS if name in dataset.column_names), None)


def _samples(
    role: Role,
    source: str,
    split: str,
    dataset: Any,
    content: str,
    label: str,
    findings: Findings,
    *,
    of_texts: bool,
    skip_empty: bool,
) -> Samples:
    option = f"--{role} {source!r}"
    names = getattr(dataset.features[label], "names", None)
    labels = [_name_of(value, names) for value in dataset[label]]
    columns = dataset.column_names
    groups = [str(g) for g in dataset[GROUP_COLUMN]] if GROUP_COLUMN in columns else None
    without = [i for i, name in enumerate(labels) if not name]
    if without:
        rows = listed([str(i) for i in without])
        have = "row has" if len(without) == 1 else "rows have"
        what = f"{option}: {len(without)} {have} no {label}: {rows}"
        findings.stop(what, "take them out")
    chosen = [i for i, name in enumerate(labels) if name]
    contents: list[Any]
    if of_texts:
        texts = [text or "" for text in dataset[content]]
        empty = [repr(str(i)) for i in chosen if not texts[i].strip()]
        tell_empty(option, content, empty, findings, skip=skip_empty)
        chosen = [i for i in chosen if texts[i].strip()]
        contents = [texts[i] for i in chosen]
    else:
        images = importlib.import_module("datasets").Image(decode=False)
        stored = dataset.cast_column(content, images).select_columns([content])
        contents = [StoredImage(stored, content, i) for i in chosen]
    return Samples(
        role,
        source,
        names=tuple(f"{split}:{i}" for i in chosen),
        labels=tuple(labels[i] for i in chosen),
        contents=tuple(contents),
        groups=None if groups is None else tuple(groups[i] for i in chosen),
    )


def _name_of(value: Any, names: list[str] | None) -> str:
    """A class as a string; "" where there is none."""
    if value is None or (names is not None and value < 0):
        return ""
    return composed(names[value] if names is not None else str(value)).strip()
