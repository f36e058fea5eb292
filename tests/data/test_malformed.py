"""A malformed row: file, line, field, reason, remedy, in one line."""

import pytest

from hybrid_engine.config import DataConfig
from hybrid_engine.data import load_stage
from hybrid_engine.data.schema import parse_columns
from hybrid_engine.errors import UserError
from tests.data.files import assistant, user, write_jsonl
from tests.tiny import make_tiny_tokenizer

GOOD_TEXT = '{"text": "fine"}'
GOOD_PAIR = '{"prompt": "q", "chosen": "a", "rejected": "b"}'
GOOD_ANSWER = '{"prompt": "q", "completion": "a"}'
GOOD_CHAT = (
    '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}'
)
GOOD_LABEL = '{"text": "fine", "label": 1}'


def load(paths, stage="sft", **config):
    return load_stage(
        DataConfig(path=tuple(paths), **config),
        stage,
        make_tiny_tokenizer(),
        seed=0,
        eos_token_id=257,
    )


CASES = {
    "bad JSON": (
        GOOD_TEXT,
        '{"text": "a"',
        "bad JSON: Expecting ',' delimiter (column 13); mend or remove the row",
    ),
    "no object": (
        GOOD_TEXT,
        '["text"]',
        'not a JSON object but a list; write each row as {"column": value, ...}',
    ),
    "missing column": (
        GOOD_PAIR,
        '{"prompt": "q", "chosen": "a", "worse": "b"}',
        "column 'rejected' is missing (found chosen, prompt, worse); give it or remove the row",
    ),
    "null": (
        GOOD_TEXT,
        '{"text": null}',
        "column 'text' is missing (found none); give it or remove the row",
    ),
    "wrong type": (GOOD_TEXT, '{"text": 3}', "column 'text' is a number; give text"),
    "wrong type of turns": (
        GOOD_CHAT,
        '{"messages": "hi"}',
        "column 'messages' is a string; give a list of messages",
    ),
    "neither": (
        GOOD_ANSWER,
        '{"prompt": {}, "completion": "a"}',
        "column 'prompt' is an object; give text or a list of messages",
    ),
    "empty text": (
        GOOD_TEXT,
        '{"text": " \\n"}',
        "column 'text' is empty; give text or remove the row",
    ),
    "empty list": (
        GOOD_CHAT,
        '{"messages": []}',
        "column 'messages' is an empty list; give at least one message",
    ),
    "unknown role": (
        GOOD_CHAT,
        '{"messages": [{"role": "human", "content": "q"}]}',
        "messages[0] has the unknown role 'human'; use one of system, developer, user, "
        "assistant, tool",
    ),
    "ShareGPT keys": (
        GOOD_CHAT,
        '{"messages": [{"from": "user", "value": "q"}]}',
        "messages[0] has no 'role' (found 'from', 'value'); give 'role' and 'content'",
    ),
    "no message": (
        GOOD_CHAT,
        '{"messages": ["q"]}',
        "messages[0] is a string; give an object with 'role' and 'content'",
    ),
    "empty turn": (
        GOOD_CHAT,
        '{"messages": [{"role": "user", "content": ""}]}',
        "column 'messages[0].content' is empty; give text or remove the row",
    ),
    "equal answers": (
        GOOD_PAIR,
        '{"prompt": "q", "chosen": "a", "rejected": "a"}',
        "'chosen' and 'rejected' are equal; remove the row",
    ),
    "mixed answers": (
        GOOD_PAIR,
        '{"prompt": "q", "chosen": "a", "rejected": [{"role": "assistant", "content": "b"}]}',
        "'chosen' is a string and 'rejected' is a list; give both in one form",
    ),
    "answer by the user": (
        GOOD_PAIR,
        '{"prompt": "q", "chosen": [{"role": "user", "content": "a"}],'
        ' "rejected": [{"role": "user", "content": "b"}]}',
        "column 'chosen' ends with role 'user'; an answer ends with 'assistant'",
    ),
    "prompt by the assistant": (
        GOOD_ANSWER,
        '{"prompt": [{"role": "assistant", "content": "a"}], "completion": "b"}',
        "column 'prompt' ends with role 'assistant'; move that turn to the answer's column",
    ),
    "one continues the other": (
        '{"chosen": [{"role": "assistant", "content": "a"}],'
        ' "rejected": [{"role": "assistant", "content": "b"}]}',
        '{"chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],'
        ' "rejected": [{"role": "user", "content": "q"}]}',
        "'chosen' continues 'rejected' or the other way round; each must end with its own answer",
    ),
    "label": (
        GOOD_LABEL,
        '{"text": "a", "label": "positive"}',
        "column 'label' is 'positive'; give 1 (good) or 0 (bad)",
    ),
    "margin type": (
        GOOD_PAIR,
        '{"prompt": "q", "chosen": "a", "rejected": "b", "margin": "big"}',
        "column 'margin' is a string; give a number",
    ),
    "margin infinite": (
        GOOD_PAIR,
        '{"prompt": "q", "chosen": "a", "rejected": "b", "margin": Infinity}',
        "column 'margin' is inf; give a finite number",
    ),
    "half a surrogate pair": (
        GOOD_TEXT,
        '{"text": "a\\ud800"}',
        "column 'text' holds half a surrogate pair (character 1), which no text has; mend it",
    ),
}


@pytest.mark.parametrize(("good", "bad", "reason"), CASES.values(), ids=CASES.keys())
def test_a_malformed_row_is_named(tmp_path, good, bad, reason):
    path = tmp_path / "data.jsonl"
    path.write_text(f"{good}\n\n{bad}\n{good}\n")
    with pytest.raises(UserError) as error:
        load([str(path)])
    assert str(error.value) == f"{path}:3: {reason}"


def test_the_first_bad_row_is_shown_and_the_others_counted(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(f'{GOOD_TEXT}\n{{"text": ""}}\n{GOOD_TEXT}\nx\n[]\n')
    with pytest.raises(UserError) as error:
        load([str(path)])
    assert str(error.value) == (
        f"{path}:2: column 'text' is empty; give text or remove the row (2 more malformed rows)"
    )


def test_text_that_is_not_utf8(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD_TEXT.encode() + b'\n{"text": "caf\xe9"}\n')
    with pytest.raises(UserError) as error:
        load([str(path)])
    assert str(error.value) == f"{path}:2: not UTF-8 (byte 13 of the row); save the file as UTF-8"


def test_a_csv_row_with_too_many_fields(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("prompt,completion\nq,a\nq, well, a\n")
    with pytest.raises(UserError) as error:
        load([str(path)])
    assert str(error.value) == (
        f"{path}:3: 3 fields where the header has 2 (prompt, completion); quote fields that "
        "contain commas"
    )


def test_columns_that_training_cannot_use(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", [{"question": "q", "answer": "a"}])
    with pytest.raises(UserError) as error:
        load([path])
    assert str(error.value) == (
        f"{path}:1: no usable columns (found answer, question); give prompt; text; text + label; "
        "messages; "
        "prompt + completion; prompt + completion + label; chosen + rejected, "
        "or map yours with data.columns THEIRS=OURS"
    )


def test_a_mapping_mistake_does_not_pass_unseen(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", [{"question": "q", "answer": "a"}])
    with pytest.raises(
        UserError, match=r"no source has a column 'questoin' in its first row \(found answer, quest"
    ):
        load([path], columns=("questoin=prompt",))
    with pytest.raises(
        UserError, match="'question:prompt' is not THEIRS=OURS with OURS one of text, messages"
    ):
        parse_columns(["question:prompt"])
    with pytest.raises(UserError, match="'question=ask' is not THEIRS=OURS"):
        parse_columns(["question=ask"])
    with pytest.raises(UserError, match="two columns are mapped to 'prompt'"):
        parse_columns(["a=prompt", "b=prompt"])


def test_turns_need_a_template(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", [{"messages": [user("q"), assistant("a")]}] * 3)
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(
        UserError, match="the row holds messages, but the tokenizer has no chat template; set"
    ):
        load_stage(DataConfig(path=(path,)), "sft", tokenizer, 0, 257)


def test_a_template_that_refuses_a_row_names_it(tmp_path):
    rows = [
        {"messages": [user("q"), assistant("a")]},
        {"messages": [user("q"), user("q"), assistant("a")]},
    ]
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[1:] and messages[0].role == messages[1].role %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
    ) + tokenizer.chat_template
    with pytest.raises(UserError) as error:
        load_stage(DataConfig(path=(path,), split=(1, 0, 0)), "sft", tokenizer, 0, 257)
    assert str(error.value) == (
        f"{path}:2: the tokenizer's chat template refuses these messages (roles must alternate); "
        "mend the row or set data.chat_template to 'never'"
    )


def test_nothing_left_says_why(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", [{"prompt": f"{i}" * 300} for i in range(9)])
    with pytest.raises(UserError) as error:
        load([path], stage="rlhf")
    assert str(error.value) == (
        f"step 3 (rlhf) has no rows to train on, of 9 in {path} (9 left out: prompt longer than "
        "256 tokens); give more "
        "rows, another data.split, or rows that this step can use (a longer "
        "data.max_prompt_tokens?)"
    )
    with pytest.raises(
        UserError, match=r"9 left out: .*: rows of kind 'prompt' do not serve this step"
    ):
        load([path], stage="sft")
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": f"{i}"} for i in range(9)])
    with pytest.raises(UserError, match=r"data\.split gives it a share of 0 in \[0, 1, 1\]"):
        load([texts], stage="sft", split=(0, 1, 1))


def test_a_length_beyond_the_context(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", [{"text": "a"}])
    with pytest.raises(
        UserError, match=r"data\.max_length \(513\) is more than the model's context of 512 tokens"
    ):
        load([path], max_length=513)
