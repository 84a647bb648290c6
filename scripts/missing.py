"""Prints the packages of the dev set that this environment lacks; torch and triton are never named.

Used by `make setup` on machines that lend their own torch, so that nothing replaces it.
"""

import importlib.util

# module -> requirement
WANTED = {
    "numpy": "numpy",
    "hypothesis": "hypothesis>=6.100",
    "pytest": "pytest>=8",
    "pytest_benchmark": "pytest-benchmark>=5",
    "xdist": "pytest-xdist>=3.5",
    "pybind11": "pybind11>=2.13",
    "ninja": "ninja",
    "cmake": "cmake>=3.25",
    "setuptools": "setuptools>=77",
    "wheel": "wheel",
    "sklearn": "scikit-learn>=1.3",
    "matplotlib": "matplotlib>=3.8",
    "rich": "rich>=13",
    "safetensors": "safetensors>=0.4",
}

if __name__ == "__main__":
    absent = [need for name, need in WANTED.items() if importlib.util.find_spec(name) is None]
    # pip with nothing to install is an error; pip itself is always there.
    print(" ".join(absent) or "pip")
