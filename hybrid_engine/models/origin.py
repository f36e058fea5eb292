"""What a path or hub name leads to: a model, or an adapter with the model that it adapts."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from hybrid_engine.errors import UserError

from .adapter_files import AdapterFile
from .checkpoint_files import Base, is_adapter, locate, locate_any


class Origin(NamedTuple):
    """Directory and name of a whole model, and the adapter that goes on it, if any."""

    directory: Path
    name: str
    adapter: AdapterFile | None


def find(path: str | Path, base: str | Path | None = None) -> Origin:
    """Resolve a directory or hub name; ``base`` takes the place of the one that an adapter names.

    Raises:
        UserError: neither model nor adapter, an adapter without its base, or a base for no adapter.
    """
    directory = locate_any(path)
    if not is_adapter(directory):
        if base is not None:
            raise UserError(f"{path} is a whole model; only an adapter takes a base")
        return Origin(directory, Base.name_of(path), None)
    adapter = AdapterFile.read(directory)
    name = base or adapter.base
    if not name:
        raise UserError(f"{path}: the adapter names no base model; give one")
    if base is None and adapter.revision:
        raise UserError(
            f"{path}: the adapter's base is {name} at revision {adapter.revision}; download that, "
            "and give its directory as the base"
        )
    try:
        return Origin(locate(name), Base.name_of(name), adapter)
    except UserError as error:
        raise UserError(f"{path}: the base of this adapter cannot be had: {error}") from error
