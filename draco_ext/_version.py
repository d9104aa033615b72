"""The version: this is its only place. pyproject.toml reads it when the package is built."""

__version__ = "0.1.0"
