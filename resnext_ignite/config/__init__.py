"""The config of a run: `sections` and `schema` define its keys, and `files` reads and writes it.

`resume` lists the keys that a resumed run may change.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resnext_ignite.config.files import load_config, save_config
    from resnext_ignite.config.schema import Config

__all__ = ["Config", "load_config", "save_config"]


def __getattr__(name: str) -> Any:
    # Import on first use: code that needs only the schema does not import the YAML reader.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{'schema' if name == 'Config' else 'files'}"), name)
