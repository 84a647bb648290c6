"""Optional packages: what they are for, and how to install them."""

from __future__ import annotations

# module -> (purpose, what pip installs)
OPTIONAL = {
    "triton": ("Triton kernels", "triton"),
    "safetensors": ("FeatureTable and embeddings on disk", "'mts_fast[features]'"),
    "timm": ("features.embed('timm:NAME')", "timm"),
    "torchvision": ("features.embed('torchvision:NAME')", "torchvision"),
    "sklearn": ("the demo's digits", "'mts_fast[demo]'"),
    "PIL": ("pictures", "'mts_fast[train]'"),
    "captum": ("mts-fast report", "'mts_fast[report]'"),
    "jinja2": ("mts-fast report", "'mts_fast[report]'"),
    "pydantic": ("mts-fast train", "'mts_fast[train]'"),
    "transformers": ("mts-fast train on texts", "transformers"),
    "pyarrow": ("mts-fast train on Parquet lists", "pyarrow"),
    "matplotlib": ("the demo's pictures", "'mts_fast[demo]'"),
    "cleanlab": ("the demo's confident learning", "'mts_fast[evidence]'"),
    "rich": ("tables and progress bars", "'mts_fast[features]'"),
}


def hint_for(module: str) -> str:
    """What to do where the module is missing; "" for a module that is not in OPTIONAL."""
    return f"pip install {OPTIONAL[module][1]}" if module in OPTIONAL else ""
