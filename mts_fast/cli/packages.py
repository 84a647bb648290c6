"""Optional packages: what they are for, and the extra that installs them."""

from __future__ import annotations

from typing import NamedTuple


class Package(NamedTuple):
    """An optional package of Python: its purpose, and an extra of pyproject.toml that has it."""

    purpose: str
    extra: str
    # the name that pip knows, where it is not the module's
    distribution: str = ""


# by module; a test compares this with pyproject.toml and with what is imported
OPTIONAL = {
    "triton": Package("Triton kernels", "triton"),
    "safetensors": Package("FeatureTable and embeddings on disk", "features"),
    "faiss": Package("approximate search of distribution features", "approximate", "faiss-cpu"),
    "timm": Package("models and embeddings of 'timm:NAME'", "models"),
    "torchvision": Package("models and embeddings of 'torchvision:NAME'", "models"),
    "sklearn": Package("the demo's digits", "demo", "scikit-learn"),
    "PIL": Package("pictures", "train", "pillow"),
    "pydantic": Package("mts-fast train", "train"),
    "captum": Package("mts-fast report", "report"),
    "jinja2": Package("mts-fast report", "report"),
    "transformers": Package("mts-fast train on texts", "texts"),
    "pyarrow": Package("mts-fast train on Parquet lists", "data"),
    "datasets": Package("Fashion-MNIST where its files are not there", "data"),
    "matplotlib": Package("the demo's pictures", "demo"),
    "cleanlab": Package("the demo's confident learning", "evidence"),
    "pytest_benchmark": Package("mts-fast bench", "bench", "pytest-benchmark"),
    "rich": Package("tables and progress bars", "features"),
}


def hint_for(module: str) -> str:
    """What to do where the module is missing; "" for a module that is not in OPTIONAL."""
    return f"pip install 'mts_fast[{OPTIONAL[module].extra}]'" if module in OPTIONAL else ""
