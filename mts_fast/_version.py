"""The version, where it can be read without torch."""

__version__ = "0.1.0"
