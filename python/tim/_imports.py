"""Modules of the user's own code, named on the command line."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def network_at(path: str, what: str) -> nn.Module:
    """The module at "package.module:attribute": the attribute itself, or what it makes when called
    without arguments.

    Args:
        what: what the path is given as, for messages.

    Raises:
        ImportError: the module cannot be imported.
        ValueError: the path has no colon, or the module no such attribute.
        TypeError: the attribute makes no nn.Module.
    """
    from torch import nn

    module, colon, attribute = path.partition(":")
    if not (module and colon and attribute):
        raise ValueError(f"{what} must be package.module:attribute, got {path!r}")
    try:
        made = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise ImportError(f"{what} {path}: {error}") from None
    except AttributeError:
        raise ValueError(f"{what} {path}: module {module} has no {attribute}") from None
    if callable(made) and not isinstance(made, nn.Module):
        made = made()
    if not isinstance(made, nn.Module):
        raise TypeError(f"{what} {path} must make an nn.Module, got {type(made).__name__}")
    return made
