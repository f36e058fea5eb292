"""What each step takes from each kind of row."""

import pytest

from hybrid_engine.config import DataConfig
from hybrid_engine.data import PairExample, PromptExample, SFTExample, load_stage
from hybrid_engine.errors import UserError
from tests.data.files import assistant, user, write_jsonl
from tests.tiny import make_tiny_tokenizer

EOS = 257
TOKENIZER = make_tiny_tokenizer()


def load(tmp_path, rows, stage, **config):
    share = tuple(float(stage == name) for name in ("sft", "reward", "rlhf"))
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    config = DataConfig(path=(path,), **{"split": share, "max_prompt_tokens": 200, **config})
    return load_stage(config, stage, TOKENIZER, 0, EOS)


def everything(data):
    return [*data.train, *data.heldout]


def text(tokens):
    return TOKENIZER.decode(tokens)


def chat(*contents):
    """Rendered turns, starting with the user."""
    roles = ("user", "assistant")
    return "".join(f"<|im_start|>{roles[i % 2]}\n{c}<|im_end|>\n" for i, c in enumerate(contents))


GENERATE = "<|im_start|>assistant\n"
PAIR = {"chosen": "good", "rejected": "bad"}
TURNS = [user("q"), assistant("a"), user("q2"), assistant("a2")]
CONTEXT = chat("q", "a", "q2") + GENERATE

SFT = {
    "text": ({"text": "a b c d e hello world"}, "a b c d e", " hello world"),
    "prompt + completion": ({"prompt": "Q:", "completion": " A"}, "Q:", " A"),
    "chosen": ({"prompt": "Q:", **PAIR}, "Q:", "good"),
    "messages": ({"messages": TURNS[:2]}, chat("q") + GENERATE, "a"),
    "turns of a pair": (
        {"prompt": TURNS[:3], "chosen": [assistant("good")], "rejected": [assistant("bad")]},
        CONTEXT,
        "good",
    ),
    "turns with a string": ({"prompt": TURNS[:3], "completion": "a2"}, CONTEXT, "a2"),
    "string with turns": (
        {"prompt": "q", "completion": [assistant("a")]},
        chat("q") + GENERATE,
        "a",
    ),
}


@pytest.mark.parametrize(("row", "prompt", "answer"), SFT.values(), ids=SFT.keys())
def test_sft_learns_the_answer(tmp_path, row, prompt, answer):
    (example,) = everything(load(tmp_path, [row], "sft"))
    assert isinstance(example, SFTExample)
    assert example.spans == ((example.prompt_length, len(example.tokens)),)
    assert text(example.tokens[: example.prompt_length]) == prompt
    assert text(example.tokens[example.prompt_length :]) == f"{answer}<|im_end|>"


REWARD = {
    "strings": ({"prompt": "Q:", **PAIR}, "Q:"),
    "turns": (
        {"prompt": TURNS[:3], "chosen": [assistant("good")], "rejected": [assistant("bad")]},
        CONTEXT,
    ),
    "implicit turns": (
        {"chosen": [*TURNS[:3], assistant("good")], "rejected": [*TURNS[:3], assistant("bad")]},
        CONTEXT,
    ),
    "turns repeated in the answers": (
        {
            "prompt": "q",
            "chosen": [user("q"), assistant("good")],
            "rejected": [user("q"), assistant("bad")],
        },
        chat("q") + GENERATE,
    ),
    "implicit HH": (
        {"chosen": "\n\nHuman: q\n\nAssistant:good", "rejected": "\n\nHuman: q\n\nAssistant:bad"},
        "\n\nHuman: q\n\nAssistant:",
    ),
    "no prompt": (PAIR, "<|im_start|>"),
}


@pytest.mark.parametrize(("row", "prompt"), REWARD.values(), ids=REWARD.keys())
def test_reward_compares_the_answers_after_one_prompt(tmp_path, row, prompt):
    (example,) = everything(load(tmp_path, [row], "reward"))
    assert isinstance(example, PairExample)
    assert text(example.chosen) == f"{prompt}good<|im_end|>"
    assert text(example.rejected) == f"{prompt}bad<|im_end|>"
    assert text(example.chosen[: example.prompt_length]) == prompt
    assert example.margin == 0.0


def test_a_row_may_bring_its_margin(tmp_path):
    rows = [
        {"prompt": f"{i}", **PAIR, "margin": margin} for i, margin in enumerate((1.5, "2", None))
    ]
    examples = everything(load(tmp_path, rows, "reward"))
    assert sorted(example.margin for example in examples) == [0.0, 1.5, 2.0]


RLHF = {
    "prompt": ({"prompt": "Q:"}, "Q:"),
    "pair": ({"prompt": "Q:", **PAIR}, "Q:"),
    "prompt turns": ({"prompt": TURNS[:3]}, CONTEXT),
    "conversation": ({"messages": TURNS}, CONTEXT),
    "waiting conversation": ({"messages": TURNS[:3]}, CONTEXT),
}


@pytest.mark.parametrize(("row", "prompt"), RLHF.values(), ids=RLHF.keys())
def test_rlhf_asks_the_prompt(tmp_path, row, prompt):
    (example,) = everything(load(tmp_path, [row], "rlhf"))
    assert isinstance(example, PromptExample)
    assert example.text == prompt
    assert text(example.tokens) == prompt


def test_text_rows_give_their_first_words(tmp_path):
    rows = [{"text": "one two three"}, {"text": "one two"}]
    prompts = load(tmp_path, rows, "rlhf", prompt_words=2)
    assert [example.text for example in everything(prompts)] == ["one two"]
    assert prompts.left_out == {"no more than 2 words (data.prompt_words)": 1}
    (example,) = everything(load(tmp_path, rows, "sft", prompt_words=2))
    assert text(example.tokens[: example.prompt_length]) == "one two"
    assert text(example.tokens[example.prompt_length :]) == " three<|im_end|>"


def test_without_prompt_words_texts_are_learnt_whole_and_prompt_nothing(tmp_path):
    rows = [{"text": "one two three"}, {"text": "one two"}]
    examples = everything(load(tmp_path, rows, "sft", prompt_words=0))
    assert {text(e.tokens) for e in examples} == {
        f"<|im_start|>{row['text']}<|im_end|>" for row in rows
    }
    assert all(e.prompt_length == 1 for e in examples)
    with pytest.raises(UserError, match=r"2 left out: no prompt, because data\.prompt_words is 0"):
        load(tmp_path, rows, "rlhf", prompt_words=0)
    labelled_rows = labelled(20, 10)
    with pytest.raises(UserError, match=r"20 left out: no prompt, .*data\.prompt_words"):
        load(tmp_path, labelled_rows, "rlhf", prompt_words=0)


def test_no_text_row_prompts_with_nothing_by_default(tmp_path):
    rows = [{"text": " ".join("abcdefghij"[: i % 10 + 1]) + f" {i}"} for i in range(40)]
    data = load(tmp_path, rows, "rlhf")
    # Of 2 to 5 words.
    assert data.left_out == {"no more than 5 words (data.prompt_words)": 16}
    assert {example.text for example in everything(data)} == {"a b c d e"}


def test_other_columns_reach_the_rewards_and_mapped_ones_are_ours(tmp_path):
    rows = [{"question": "Q:", "answer": "42", "id": 7, "completion": "so 42"}]
    (example,) = everything(load(tmp_path, rows, "rlhf", columns=("question=prompt",)))
    assert example.text == "Q:"
    assert example.extra == {"answer": "42", "id": 7, "completion": "so 42"}


def test_long_prompts_are_left_out_and_counted(tmp_path):
    rows = [{"prompt": f"{i}" * length, **PAIR} for i, length in enumerate((19, 20, 21, 500))]
    for stage in ("sft", "reward", "rlhf"):
        data = load(tmp_path, rows, stage, max_prompt_tokens=20, max_length=64)
        assert data.left_out == {"prompt longer than 20 tokens": 2}
        assert len(everything(data)) == 2


def targets(example):
    return [text(example.tokens[begin:end]) for begin, end in example.spans]


def test_a_conversation_teaches_every_turn_of_the_assistant(tmp_path):
    (example,) = everything(load(tmp_path, [{"messages": TURNS}], "sft"))
    assert text(example.tokens) == (chat("q", "a", "q2") + GENERATE + "a2<|im_end|>")
    assert targets(example) == ["a<|im_end|>", "a2<|im_end|>"]
    assert text(example.tokens[: example.prompt_length]) == chat("q") + GENERATE
    assert example.num_targets == len("a") + len("a2") + 2


def test_a_conversation_that_waits_teaches_what_was_answered(tmp_path):
    rows = [TURNS[:3], TURNS[:1], TURNS[1:3], TURNS[1:2]]
    data = load(tmp_path, [{"messages": turns} for turns in rows], "sft")
    (example,) = everything(data)
    assert text(example.tokens) == chat("q") + GENERATE + "a<|im_end|>"
    assert data.left_out == {"conversation without an answer by the assistant": 3}


def test_a_greeting_prompts_nothing(tmp_path):
    data = load(tmp_path, [{"messages": TURNS[:2]}, {"messages": TURNS[1:2]}], "rlhf")
    assert [example.text for example in everything(data)] == [chat("q") + GENERATE]
    assert data.left_out == {"no prompt": 1}


def test_a_long_conversation_is_cut_and_its_later_questions_do_not_count(tmp_path):
    rows = [{"messages": [user("q"), assistant("a"), user("u" * 300), assistant("b")]}]
    limits = {"max_prompt_tokens": 40, "max_length": 100}
    (example,) = everything(load(tmp_path, rows, "sft", **limits))
    assert targets(example) == ["a<|im_end|>"]
    rows = [{"messages": [user("u" * 40), assistant("a")]}]
    with pytest.raises(UserError, match="1 left out: prompt longer than 40 tokens"):
        load(tmp_path, rows, "sft", **limits)


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_a_model_without_end_tokens_cannot_learn_answers(tmp_path, stage):
    path = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "Q:", **PAIR}])
    config = DataConfig(path=(path,), split=(1, 1, 1))
    with pytest.raises(UserError, match="declares an end token.*set eos_token in its"):
        load_stage(config, stage, TOKENIZER, 0, ())


def test_answers_that_differ_only_beyond_the_cut_are_left_out(tmp_path):
    rows = [
        {"prompt": "abcd", "chosen": "x" * 20 + "good", "rejected": "x" * 20 + "bad"},
        {"prompt": "abcd", **PAIR},
    ]
    data = load(tmp_path, rows, "reward", max_prompt_tokens=8, max_length=16)
    assert data.left_out == {"answers are equal up to data.max_length": 1}
    assert len(everything(data)) == 1


def labelled(count, good, prompt=None):
    rows = [
        {"text": f"{'good' if i < good else 'bad'} {i}", "label": int(i < good)}
        for i in range(count)
    ]
    return (
        rows
        if prompt is None
        else [{"prompt": prompt, "completion": r["text"], "label": r["label"]} for r in rows]
    )


@pytest.mark.parametrize("prompt", [None, "Q:"], ids=["texts", "answers"])
def test_labelled_rows_are_paired_and_each_takes_part(tmp_path, prompt):
    data = load(tmp_path, labelled(60, 20, prompt), "reward", prompt_words=0)
    pairs = everything(data)
    chosen, rejected = (
        [text(getattr(pair, side)) for pair in pairs] for side in ("chosen", "rejected")
    )
    assert all("good" in c and "bad" in r for c, r in zip(chosen, rejected, strict=True))
    assert len(set(chosen)) == 20
    assert len(set(rejected)) == 40
    held = {text(pair.rejected) for pair in data.heldout}
    assert held
    assert not held & {text(pair.rejected) for pair in data.train}
    assert all(pair.prompt_length == (1 if prompt is None else 2) for pair in pairs)


def test_labelled_texts_with_their_own_first_words_share_no_prompt(tmp_path):
    pairs = everything(load(tmp_path, labelled(20, 10), "reward", prompt_words=1))
    assert {pair.prompt_length for pair in pairs} == {0}


def test_one_label_alone_makes_no_pairs(tmp_path):
    with pytest.raises(UserError, match="9 left out: no row of the other label to pair with"):
        load(tmp_path, labelled(10, 10)[:9], "reward")


def test_sft_leaves_bad_answers_out_but_learns_texts_of_both_labels(tmp_path):
    data = load(tmp_path, labelled(20, 10, "Q:"), "sft")
    assert data.left_out == {"answer labelled 0": 10}
    assert len(everything(data)) == 10
    assert len(everything(load(tmp_path, labelled(20, 10), "sft", prompt_words=1))) == 20


def test_examples_are_made_at_access(tmp_path, monkeypatch):
    rows = [{"text": f"row {i}"} for i in range(50)]
    data = load(tmp_path, rows, "sft", prompt_words=0)
    calls = []
    inner = TOKENIZER.__class__.__call__
    monkeypatch.setattr(
        TOKENIZER.__class__, "__call__", lambda *a, **k: calls.append(a[1]) or inner(*a, **k)
    )
    first = data.train[0]
    assert calls == [text(first.tokens[1:-1])]
    assert data.train[-1] == data.train[len(data.train) - 1]
    assert data.train[1:3] == [data.train[1], data.train[2]]
    with pytest.raises(IndexError):
        data.train[len(data.train)]


def test_sources_of_different_kinds_are_used_where_they_serve(tmp_path):
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": f"{i}", **PAIR} for i in range(20)])
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"p{i}"} for i in range(30)])
    config = DataConfig(path=(pairs, prompts), split=(0, 1, 1))
    reward = load_stage(config, "reward", TOKENIZER, 0, EOS)
    assert reward.left_out == {f"{prompts}: rows of kind 'prompt' do not serve this step": 30}
    rlhf = load_stage(config, "rlhf", TOKENIZER, 0, EOS)
    assert len(everything(reward)) + len(everything(rlhf)) == 50
    assert sum(example.text.startswith("p") for example in everything(rlhf)) == 30
