"""The command line and YAML: precedence, refusals with advice, round trips, help."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from hybrid_engine.cli import from_yaml, option_names, parse, to_yaml
from hybrid_engine.cli_help import show_help
from hybrid_engine.config import RunConfig
from hybrid_engine.errors import UserError
from hybrid_engine.fields import build, flatten, sections
from hybrid_engine.fields import settings as all_settings
from hybrid_engine.yaml_config import load_values

ROOT = Path(__file__).resolve().parent.parent


def quiet(*argv: str) -> RunConfig:
    return parse(argv, say=lambda text: None)


def refusal(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        quiet(*argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(textwrap.dedent(text))
        return str(path)

    return write


# --- precedence ---


def test_flag_over_yaml_over_default(yaml_file):
    path = yaml_file("seed: 5\nrlhf: {kl: {coef: 0.2, target: 3}}")
    config = quiet("--config", path, "--rlhf.kl.coef", "0.5")
    assert (config.rlhf.kl.coef, config.rlhf.kl.target, config.seed) == (0.5, 3.0, 5)
    assert config.rlhf.kl.horizon == RunConfig().rlhf.kl.horizon


@pytest.mark.parametrize(
    "argv", [[], ["--seed", "3"], ["--reward-model", "x"], ["--config", "demo"]]
)
def test_demo_recipe_is_the_embedded_default(argv):
    config = quiet(*argv)
    assert config.judge.unseen_judge == "imdb-tfidf" != RunConfig().judge.unseen_judge


@pytest.mark.parametrize(
    "argv", [["--actor-model", "facebook/opt-1.3b"], ["--data-path", "a.jsonl"]]
)
def test_own_model_or_data_starts_from_plain_defaults(argv):
    assert quiet(*argv).judge == RunConfig().judge


def test_choice_of_the_recipe_is_said():
    said = []
    parse([], said.append)
    assert len(said) == 1
    assert "'demo'" in said[0]
    parse(["--config", "demo"], said.append)
    assert len(said) == 1


def test_announcement_form():
    config = quiet(
        "--actor-model",
        "facebook/opt-1.3b",
        "--reward-model",
        "facebook/opt-350m",
        "--num-gpus",
        "1",
    )
    assert config.model.actor_model == "facebook/opt-1.3b"
    assert config.model.reward_model == "facebook/opt-350m"
    assert config.num_gpus == 1


def test_launchers_rank_is_no_setting():
    assert quiet("--local_rank=1", "--seed", "3").seed == 3


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID"])
def test_only_the_first_rank_announces(monkeypatch, capsys, variable):
    monkeypatch.delenv("RANK", raising=False)  # a process group of another test sets it
    monkeypatch.setenv(variable, "1")
    parse([])
    assert capsys.readouterr().out == ""


# --- spellings ---


@pytest.mark.parametrize(
    "option", ["--rlhf.kl.coef", "--rlhf.actor-optimizer.eps", "--rlhf.actor_optimizer.eps"]
)
def test_dashes_and_underscores(option):
    name = option.lstrip("-").replace("-", "_")
    assert flatten(quiet(option, "0.25"))[name] == 0.25


@pytest.mark.parametrize("argv", [["2,4,4"], ["2", "4", "4"], ["2,", "4,", "4"], ["2", "4,4"]])
def test_lists_by_space_or_comma(argv):
    assert quiet("--data-split", *argv).data.split == (2.0, 4.0, 4.0)


def test_list_with_equals_sign():
    assert quiet("--data-path=a.jsonl", "b.jsonl", "--steps=1,3").data.path == (
        "a.jsonl",
        "b.jsonl",
    )


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["--resume"], True),
        (["--no-resume"], False),
        (["--resume=true"], True),
        (["--resume", "no"], False),
    ],
)
def test_booleans(argv, expected):
    assert quiet(*argv).resume is expected


def test_nested_boolean_can_be_switched_off():
    assert quiet("--no-rlhf.whiten-advantages").rlhf.whiten_advantages is False


def test_empty_list_and_negative_number():
    assert quiet("--data.weights=").data.weights == ()
    refused = refusal("--sft.optimizer.weight-decay", "-0.5")  # a value, not an option
    assert refused == "sft.optimizer: weight_decay is -0.5; give 0 or more"


def test_spellings_are_unambiguous():
    spellings = sum(
        len({setting.option, "--" + setting.path.replace("_", "-")})
        * (2 if setting.kind is bool else 1)
        for setting in all_settings().values()
    )
    assert len(option_names()) == spellings


# --- refusals ---


@pytest.mark.parametrize(
    "argv, parts",
    [
        (["--actr-model", "x"], ["unknown option --actr-model", "did you mean --actor-model"]),
        (["--rlhf.kl.coeff", "1"], ["--rlhf.kl.coeff", "did you mean --rlhf.kl.coef?"]),
        (["--kl-coef", "1"], ["did you mean --rlhf.kl.coef"]),
        (
            ["--learning-rate", "1"],
            ["--sft.optimizer.learning-rate", "--rlhf.critic-optimizer.learning-rate"],
        ),
        (["--xyzzy"], ["unknown option --xyzzy", "--help"]),
        (["--seed", "x"], ["--seed", "expected a whole number", "'x'"]),
        (["--seed", "1.5"], ["--seed", "expected a whole number"]),
        (["--seed"], ["--seed", "got nothing"]),
        (["--seed", "1", "2"], ["--seed", "expected one value", "1 2"]),
        (["--seed", "1", "--seed", "2"], ["--seed", "twice"]),
        (["--actor-model", "a", "--model.actor-model", "b"], ["model.actor_model", "twice"]),
        (["--data-split", "2,four,4"], ["--data-split", "a number", "'four'"]),
        (["--data-split", "2,4"], ["data.split", "2,4,4"]),
        (["--rlhf.kl.coef", "nan"], ["--rlhf.kl.coef", "a number", "'nan'"]),
        (["--resume", "maybe"], ["--resume", "true or false", "'maybe'"]),
        (["--no-resume", "true"], ["--no-resume", "no value"]),
        (
            ["--model.dtype", "bflot16"],
            ["'bflot16'", "float32, bfloat16, float16", "did you mean bfloat16"],
        ),
        (["--sft.optimizer.learning-rate", "0"], ["sft.optimizer", "learning_rate is 0.0"]),
        (["--steps", "3", "1"], ["--steps", "in order"]),
        (["run.yaml"], ["unexpected argument 'run.yaml'"]),
        (["--config"], ["--config", "got nothing"]),
        (["--config", "missing.yaml"], ["missing.yaml", "No such file", "demo"]),
        (["--help", "rlfh"], ["--help rlfh", "did you mean rlhf"]),
    ],
    ids=lambda value: (
        " ".join(value) if isinstance(value, list) and value[0].startswith("-") else ""
    ),
)
def test_command_line_refusals(argv, parts):
    message = refusal(*argv)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    "text, line, parts",
    [
        ("seed: 1\nrlfh: {}", 2, ["unknown key 'rlfh'", "did you mean rlhf"]),
        ("rlhf:\n  kl:\n    coeff: 1", 3, ["'rlhf.kl.coeff'", "did you mean rlhf.kl.coef"]),
        ("learning_rate: 1", 1, ["sft.optimizer.learning_rate"]),
        ("rlhf:\n  kl:\n    coef: high", 3, ["rlhf.kl.coef", "a number", "'high'"]),
        ("seed: 1.5", 1, ["seed", "a whole number", "1.5"]),
        ("seed: true", 1, ["seed", "a whole number", "'true'"]),
        ("seed:", 1, ["seed", "got nothing"]),
        ("output_dir: [a, b]", 1, ["output_dir", "text", "['a', 'b']"]),
        ("output_dir: null", 1, ["output_dir", "text", "nothing"]),
        ("resume: 2", 1, ["resume", "true or false"]),
        ("data: {path: [[a]]}", 1, ["data.path", "each item text"]),
        ("steps: [1, two]", 1, ["steps", "each item a whole number", "'two'"]),
        ("data:\n  split: {a: 1}", 2, ["data.split", "a number"]),
        ("seed: 1\nseed: 2", 2, ["seed is given twice"]),
        ("model: big", 1, ["model", "name: value"]),
        ("- seed", 1, ["name: value"]),
        ("seed: 1\n bad: [", 2, ["not valid YAML"]),
        ("a: 1\n---\nb: 2", 2, ["not valid YAML"]),
        ("? [a]\n: 1", 1, ["unknown key"]),
        ("model: {dtype: float8}", 1, ["'float8'", "float32"]),
    ],
)
def test_yaml_refusals_name_file_and_line(yaml_file, text, line, parts):
    path = yaml_file(text)
    message = refusal("--config", path)
    assert message.startswith(f"{path}:{line}: ")
    for part in parts:
        assert part in message


def test_yaml_that_is_no_text(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in refusal("--config", str(path))
    path.write_bytes(b"seed: \x07")
    assert "not valid YAML" in refusal("--config", str(path))


# --- YAML ---


def test_yaml_accepts_exponents_dots_and_dashes(yaml_file):
    path = yaml_file(
        """\
        sft: {optimizer: {learning-rate: 1e-5}}
        rlhf.kl.coef: 1
        data: {split: '1,2,3', path: a.jsonl}
        """
    )
    config = quiet("--config", path)
    assert config.sft.optimizer.learning_rate == 1e-5
    assert config.rlhf.kl.coef == 1.0
    assert isinstance(config.rlhf.kl.coef, float)
    assert config.data.split == (1.0, 2.0, 3.0)
    assert config.data.path == ("a.jsonl",)


def test_text_is_taken_as_written(yaml_file):
    config = quiet("--config", yaml_file("output_dir: 2026-13-45\ndata: {path: [1e3, 007, 'a,b']}"))
    assert config.output_dir == "2026-13-45"
    assert config.data.path == ("1e3", "007", "a,b")


def test_empty_yaml_is_the_defaults(yaml_file):
    assert quiet("--config", yaml_file("# nothing\n")) == RunConfig()


TEXTS = st.text(st.characters(codec="utf-8"), max_size=20)
FINITE = st.floats(0, 1e300, allow_nan=False)


@settings(max_examples=25, deadline=None)
@given(
    values=st.fixed_dictionaries(
        {
            "output_dir": TEXTS,
            "seed": st.integers(0, 2**63 - 1),
            "resume": st.booleans(),
            "data.path": st.lists(TEXTS, min_size=1).map(tuple),
            "data.split": st.tuples(FINITE, FINITE, st.floats(1e-300, 1)),
            "rlhf.kl.coef": FINITE,
            "sft.optimizer.eps": st.floats(1e-300, 1e-5),
            "rlhf.generation.stop_token_ids": st.lists(st.integers(0, 2**31)).map(tuple),
        }
    )
)
def test_yaml_round_trip_is_exact(values):
    config = build(values)
    text = to_yaml(config)
    assert from_yaml(text) == config
    assert yaml.safe_load(text)["seed"] == config.seed  # valid for any YAML reader


def test_saved_config_reproduces_the_run(tmp_path):
    config = quiet("--seed", "7", "--rlhf.kl.coef", "0.125")
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert quiet("--config", str(path)) == config


def test_saved_config_lists_and_explains_every_setting():
    lines = to_yaml(RunConfig()).splitlines()
    for setting in all_settings().values():
        assert any(
            line.strip().startswith(setting.name + ": ") and setting.help in line for line in lines
        )


def test_recipes_are_valid():
    for path in (ROOT / "hybrid_engine/recipes").glob("*.yaml"):
        assert isinstance(build(load_values(path.stem)), RunConfig)


# --- help ---


def help_text(section: str = "", width: int = 400) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        show_help(section, console)
    return captured.get()


def test_help_mentions_every_setting_section_choice_and_default():
    text = help_text()
    words = text.split()
    for setting in all_settings().values():
        assert setting.option in words
        assert setting.help in text
        for choice in setting.choices or ():
            assert choice in text
    for section in sections():
        assert f"\n{section or 'run'}: " in text


def test_help_of_one_section():
    text = help_text("rlhf.kl")
    assert "--rlhf.kl.coef" in text
    assert "default 0.05" in text
    assert "--seed" not in text
    assert "--rlhf.gamma" not in text


def test_help_fits_a_narrow_terminal():
    assert max(map(len, help_text("sft", width=80).splitlines())) <= 80


def test_readme_names_only_flags_that_exist():
    readme = (ROOT / "README.md").read_text()
    section = readme.split("## Steps and flags")[1].split("\n## ")[0]
    flags = set(re.findall(r"--[a-z][a-z._-]*[a-z]", section))
    assert len(flags) > 10
    assert flags <= {*option_names(), "--config", "--help"}


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.parametrize("argv, status", [(["--help"], 0), (["--sed", "1"], 1)])
def test_help_and_mistakes_do_not_wait_for_torch(argv, status):
    code = f"""
import sys
from hybrid_engine.cli import parse
from hybrid_engine.errors import UserError
status = 0
try:
    parse({argv!r})
except SystemExit as stop:
    status = stop.code
except UserError:
    status = 1
slow = ("torch", "transformers", "deepspeed", "hybrid_kernels")
heavy = [name for name in slow if name in sys.modules]
assert not heavy, heavy
sys.exit(status)
"""
    done = run_python(code)
    assert done.returncode == status, done.stderr
    assert "\x1b" not in done.stdout
