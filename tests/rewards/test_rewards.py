"""The mix and its parts: what is summed, what is passed on, and what is refused."""

import math

import pytest
import torch

from hybrid_engine.config import JudgeConfig
from hybrid_engine.errors import UserError
from hybrid_engine.rewards import RewardMix, Sample, build_rewards
from hybrid_engine.rewards.mix import parse_weight

SAMPLES = [
    Sample("What is 6 * 7?", "42", [1, 2], [3, 4], True, {"answer": "42", "level": 1}),
    Sample("What is 2 + 2?", "five", [1, 2], [5], False, {"answer": "4"}),
]


def mix(*rewards):
    return build_rewards(JudgeConfig(rewards=rewards))


@pytest.fixture
def function(tmp_path):
    """Writes a Python file with the body of ``def reward(...)`` and gives its spec."""

    def write(body, signature="prompts, completions, completion_ids, **columns"):
        lines = "\n".join(f"    {line}" for line in body.splitlines())
        (tmp_path / "rewards.py").write_text(f"import math\n\ndef reward({signature}):\n{lines}\n")
        return f"{tmp_path}/rewards.py:reward"

    return write


class Fixed:
    def __init__(self, name, scores):
        self.name = name
        self.scores = scores

    def __call__(self, samples):
        return self.scores


def test_the_total_is_the_weighted_sum():
    combined = RewardMix(
        [
            ("model", 2.0, None),
            ("a", -0.5, Fixed("a", [1.0, None])),
            ("b", 1.0, Fixed("b", [None, 3.0])),
        ]
    )
    assert combined.needs_model
    scores = combined(SAMPLES, [10.0, 20.0])
    assert scores.total == [2.0 * 10 - 0.5 * 1, 2.0 * 20 + 3]
    assert scores.parts == {"model": [10.0, 20.0], "a": [1.0, None], "b": [None, 3.0]}


def test_an_empty_share_of_a_batch_asks_nobody():
    combined = RewardMix([("model", 1.0, None), ("a", 1.0, Fixed("a", [1.0]))])
    scores = combined([], [])
    assert (scores.total, scores.parts) == ([], {"model": [], "a": []})


def test_a_sample_that_no_reward_applies_to_is_an_error():
    with pytest.raises(
        UserError, match=r"no reward applies to sample 1 \(prompt: 'What is 2 \+ 2\?'\)"
    ):
        RewardMix([("a", 1.0, Fixed("a", [1.0, None]))])(SAMPLES)


def test_the_model_alone():
    combined = mix("model")
    assert combined.needs_model
    assert combined(SAMPLES, [0.5, 1.5]).total == [0.5, 1.5]
    with pytest.raises(ValueError, match="called without model_scores"):
        combined(SAMPLES)
    with pytest.raises(
        UserError, match=r"reward model returned nan for sample 1 \(prompt: 'What is 2 \+ 2\?'\)"
    ):
        combined(SAMPLES, [0.5, math.nan])
    with pytest.raises(UserError, match="reward model returned 1 scores for 2 samples"):
        combined(SAMPLES, [0.5])


@pytest.mark.parametrize(
    ("entry", "parsed"),
    [
        ("model", ("model", 1.0)),
        ("model*0.5", ("model", 0.5)),
        ("a*b/r.py:f*-2e-1", ("a*b/r.py:f", -0.2)),
    ],
)
def test_weights(entry, parsed):
    assert parse_weight(entry) == parsed


@pytest.mark.parametrize("entry", ["model*", "model*half", "*2", "model*nan", "model*inf"])
def test_weights_that_are_no_numbers(entry):
    with pytest.raises(UserError, match="has no number after '\\*'; write SPEC\\*WEIGHT"):
        parse_weight(entry)


def test_a_function_gets_prompts_completions_ids_and_columns(function):
    spec = function(
        "assert columns['level'] == [1, None]\nreturn [float(c == a) for c, a in "
        "zip(completions, columns['answer'])]"
    )
    combined = mix(f"{spec}*3")
    assert not combined.needs_model
    scores = combined(SAMPLES)
    assert scores.total == [3.0, 0.0]
    assert scores.parts == {"reward": [1.0, 0.0]}


def test_a_function_gets_only_the_arguments_it_names(function):
    spec = function(
        "return [len(i) + len(a) for i, a in zip(completion_ids, answer)]", "completion_ids, answer"
    )
    assert mix(spec)(SAMPLES).total == [4.0, 2.0]


@pytest.mark.parametrize(
    "made",
    [
        "np.array([1.0, 2.0], np.float32)",
        "torch.tensor([1, 2])",
        "[np.float64(1), torch.tensor(2.0)]",
        "(True, 2)",
    ],
)
def test_arrays_tensors_and_scalars_are_scores(function, made):
    assert mix(function(f"import numpy as np, torch\nreturn {made}"))(SAMPLES).total == [1.0, 2.0]


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (
            "return [1.0, math.nan]",
            "returned nan for sample 1 (prompt: 'What is 2 + 2?'); return a finite number",
        ),
        (
            "return [math.inf, 1.0]",
            "returned inf for sample 0 (prompt: 'What is 6 * 7?'); return a finite number",
        ),
        ("return [1.0, 'good']", "returned a str ('good') for sample 1 (prompt: 'What is 2 + 2?')"),
        ("return [1.0]", "returned 1 scores for 2 samples; return one each"),
        ("return 1.0", "returned float; return a list of numbers, one a sample"),
        ("return None", "returned NoneType; return a list of numbers, one a sample"),
    ],
)
def test_scores_that_are_none_are_refused(function, body, problem):
    spec = function(body)
    with pytest.raises(UserError) as error:
        mix(spec)(SAMPLES)
    assert str(error.value).startswith(f"reward {spec!r} {problem}")


def test_an_exception_names_its_line(function):
    spec = function("x = 1\nreturn [1 / (len(c) - 2) for c in completions]")
    with pytest.raises(UserError) as error:
        mix(spec)(SAMPLES)
    file = spec.removesuffix(":reward")
    assert (
        str(error.value)
        == f"reward {spec!r} raised ZeroDivisionError: division by zero at {file}:5"
    )


def test_long_prompts_are_shown_in_part(function):
    sample = Sample("word\n" * 100, "a", [], [], True)
    with pytest.raises(UserError) as error:
        mix(function("return [math.nan]"))([sample])
    assert "(prompt: 'word word word word word word word word word word word wo...')" in str(
        error.value
    )


def test_files_and_names_that_do_not_load(tmp_path, function):
    spec = function("return []")
    file = spec.removesuffix(":reward")
    with pytest.raises(UserError, match=r"has no function 'rewrad' \(found reward\)"):
        mix(f"{file}:rewrad")
    with pytest.raises(UserError, match=r"names no function; write FILE\.py:FUNCTION"):
        mix(file)
    with pytest.raises(UserError, match=r"gone\.py does not exist; check the path"):
        mix(f"{tmp_path}/gone.py:reward")
    (tmp_path / "broken.py").write_text("import json\n\njson.loads('')\n")
    with pytest.raises(
        UserError, match=r"broken\.py does not load: JSONDecodeError: .* at .*broken\.py:3"
    ):
        mix(f"{tmp_path}/broken.py:reward")
    with pytest.raises(
        UserError, match="'nothing-here' is neither 'model', a directory, FILE.py:FUNCTION nor"
    ):
        mix("nothing-here")
    with pytest.raises(UserError, match=r"judge\.rewards is empty"):
        mix()


def test_equal_names_are_told_apart(function):
    spec = function("return [1.0, 2.0]")
    assert list(mix(spec, f"{spec}*2")(SAMPLES).parts) == ["reward", "reward#2"]


def tiny_reward_model(directory, add_bos=False):
    from transformers import AutoModelForSequenceClassification

    from tests.tiny import make_tiny_tokenizer, tiny_config

    # transformers looks for the last token that is not padding, so padding must not be the end
    # token.
    tokenizer = make_tiny_tokenizer(pad_is_eos=False, add_bos=add_bos)
    config = tiny_config("llama", tokenizer)
    config.num_labels = 1
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return model, tokenizer


@pytest.mark.parametrize("add_bos", [False, True])
def test_a_reward_model_directory_scores_as_transformers_does(tmp_path, add_bos):
    model, tokenizer = tiny_reward_model(tmp_path / "judge", add_bos)
    rendered = Sample("<|im_start|>user\nhi", "there", [], [], True)
    expected = []
    for sample in [*SAMPLES, rendered]:
        tokens = tokenizer(
            sample.prompt + sample.answer, add_special_tokens=sample is not rendered
        )["input_ids"]
        tokens += [tokenizer.eos_token_id] * sample.finished
        with torch.no_grad():
            expected.append(model(torch.tensor([tokens])).logits.item())
    scores = mix(str(tmp_path / "judge"))([*SAMPLES, rendered])
    # fp32 sums of 64 to 128 terms in another order.
    assert scores.total == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert list(scores.parts) == ["judge"]


def test_a_language_model_is_no_reward_model(tmp_path):
    from tests.tiny import make_tiny_model

    directory = make_tiny_model(tmp_path / "policy")
    with pytest.raises(
        UserError,
        match="is a LlamaForCausalLM without a score head; give the directory of a reward",
    ):
        mix(str(directory))
    with pytest.raises(UserError, match=r"no config\.json in this directory"):
        mix(str(tmp_path))


def test_an_adapter_scores_as_the_model_that_it_makes(tmp_path):
    from hybrid_engine.models import (
        LoRAConfig,
        load_causal_lm,
        load_scalar_model,
        save_adapter,
        save_model,
    )
    from tests.tiny import make_tiny_model

    base, lora = make_tiny_model(tmp_path / "policy"), LoRAConfig(4, 32.0)
    model = load_scalar_model(base, lora=lora)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.2)
    save_adapter(model, tmp_path / "judge")
    save_model(model, tmp_path / "merged")
    adapted, merged = (mix(str(tmp_path / name))(SAMPLES).total for name in ("judge", "merged"))
    assert adapted == pytest.approx(merged, rel=1e-4, abs=1e-5)
    save_adapter(load_causal_lm(base, lora=lora), tmp_path / "speaker")
    with pytest.raises(UserError, match="is a language model's adapter, without a score"):
        mix(str(tmp_path / "speaker"))


def test_groups_stay_within_the_token_budget():
    from hybrid_engine.rewards.model_reward import within_budget

    sequences = [[0] * n for n in (3, 4, 9, 1, 1, 5)]
    groups = list(within_budget(sequences, 7))
    assert [[len(s) for s in group] for group in groups] == [[3, 4], [9], [1, 1, 5]]
    assert list(within_budget([], 7)) == []
