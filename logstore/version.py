"""The release, for what must not import the whole package to name it."""

from __future__ import annotations

from typing import Final

__version__: Final = "0.1.0"
