"""Starting a run from an adapter: what it makes of its base is written down as a model first."""

from __future__ import annotations

import json
from pathlib import Path

from hybrid_engine.distributed.collectives import barrier, is_main
from hybrid_engine.report.files import write_atomically

MERGED_FROM = "merged_from.json"


def merged_start(name: str, directory: Path, dtype: str) -> bool:
    """Merges the adapter at `name` into its base and writes the result to `directory`, unless that
    is there already; returns whether it was written. Every rank must call this.

    A step that trains new adapters needs a base that a later reader can find, and as its reference
    the policy that it began with: neither is the old adapter's base.

    Raises:
        UserError: anything wrong with the adapter or its base.
    """
    from hybrid_engine.models import (
        load_causal_lm,
        load_scalar_model,
        load_tokenizer,
        save_model,
    )
    from hybrid_engine.models.origin import find

    origin = find(name)
    assert origin.adapter is not None
    identity = json.dumps({"adapter": name, "sha256": origin.adapter.sha256()})
    marker = directory / MERGED_FROM
    written = not marker.is_file() or marker.read_text(encoding="utf-8") != identity
    barrier("look for a merged adapter")  # before the first rank writes what the others look for
    if written and is_main():
        load = load_scalar_model if origin.adapter.classifier else load_causal_lm
        save_model(load(name, dtype), directory, load_tokenizer(name))
        write_atomically(marker, identity.encode())
    barrier("merge an adapter")
    return written
