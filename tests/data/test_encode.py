"""The prompt is a prefix, an answer ends once, nothing starts twice."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_engine.config import DataConfig
from hybrid_engine.data.encode import Encoder, first_words
from hybrid_engine.data.records import BadRow
from hybrid_engine.errors import UserError
from tests.data.files import assistant, system, user
from tests.tiny import make_tiny_tokenizer

BOS, EOS = 256, 257
TOKENIZERS = [(pad_is_eos, add_bos) for pad_is_eos in (True, False) for add_bos in (True, False)]
TURNS = [system("s"), user("q"), assistant("a"), user("q2")]


def encoder(pad_is_eos=True, add_bos=False, eos=EOS, **config):
    return Encoder(make_tiny_tokenizer(pad_is_eos, add_bos), DataConfig(**config), eos)


def decode(tokens):
    return make_tiny_tokenizer().decode(tokens)


@pytest.mark.parametrize(("pad_is_eos", "add_bos"), TOKENIZERS)
@pytest.mark.parametrize("style", ["auto", "always", "never"])
@pytest.mark.parametrize("prompt", ["question", TURNS], ids=["string", "turns"])
def test_the_prompt_is_a_token_prefix_and_the_answer_ends_once(pad_is_eos, add_bos, style, prompt):
    encode = encoder(pad_is_eos, add_bos, chat_template=style)
    answer = " answer" if isinstance(prompt, str) else [assistant("answer")]
    tokens, length = encode.sequence(prompt, answer)
    text, alone = encode.prompt(prompt)
    assert tokens[:length] == alone
    assert tokens[length:].count(EOS) == 1
    assert tokens[-1] == EOS
    assert decode(tokens[length:-1]).strip() == "answer"
    assert decode(alone).removeprefix("<|im_start|>") == text.removeprefix("<|im_start|>")


@given(st.text(min_size=1), st.text(min_size=1))
def test_any_string_survives(prompt, answer):
    encode = encoder(max_length=512, max_prompt_tokens=300)
    tokens, length = encode.sequence(prompt, answer)
    assert length == len(prompt.encode())
    assert tokens == [*encode.prompt(prompt)[1], *encode.answer_tokens(answer)][:512]


@pytest.mark.parametrize("add_bos", [False, True])
def test_a_rendered_template_does_not_start_twice(add_bos):
    _, tokens = encoder(add_bos=add_bos).prompt(TURNS)
    rendered = make_tiny_tokenizer().apply_chat_template(
        TURNS, tokenize=False, add_generation_prompt=True
    )
    assert tokens[0] == BOS
    assert tokens[1] != BOS
    assert decode(tokens) == rendered
    assert tokens == make_tiny_tokenizer().apply_chat_template(
        TURNS, add_generation_prompt=True, return_dict=False
    )


def test_a_string_starts_as_its_tokenizer_starts_it():
    assert (
        encoder(add_bos=True).prompt("ab")[1]
        == make_tiny_tokenizer(add_bos=True)("ab")["input_ids"]
    )
    assert encoder(add_bos=True).prompt("ab")[1][0] == BOS
    assert BOS not in encoder(add_bos=False).prompt("ab")[1]


@pytest.mark.parametrize("add_bos", [False, True])
def test_an_empty_prompt_is_the_start_token(add_bos):
    encode = encoder(add_bos=add_bos)
    assert encode.prompt("") == ("", [BOS])
    assert encode.sequence("", "a")[1] == 1


def test_an_empty_prompt_without_bos_starts_with_the_end_token():
    tokenizer = make_tiny_tokenizer()
    tokenizer.bos_token = None
    assert Encoder(tokenizer, DataConfig(), EOS).prompt("") == ("", [EOS])


def test_without_bos_and_end_tokens_an_empty_prompt_has_nothing_to_start_with():
    tokenizer = make_tiny_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(UserError, match="neither the tokenizer nor the model declares an end"):
        Encoder(tokenizer, DataConfig(), ()).prompt("")


def test_prompts_need_no_end_token_and_answers_do():
    encode = encoder(eos=())
    assert encode.prompt("ab") == ("ab", encoder().prompt("ab")[1])
    with pytest.raises(UserError, match=r"set eos_token .* or eos_token_id in its generation_conf"):
        encode.sequence("ab", "c")


def test_an_answer_cut_by_the_length_has_no_end():
    encode = encoder(max_length=8, max_prompt_tokens=4)
    assert encode.sequence("abcd", "xyz") == ([*encode.prompt("abcdxyz")[1], EOS], 4)
    tokens, _ = encode.sequence("abcd", "wxyz")
    assert len(tokens) == 8
    assert EOS not in tokens


def test_an_end_already_there_is_not_doubled():
    assert encoder().answer_tokens("a<|im_end|>")[-2:] != [EOS, EOS]
    assert encoder().answer_tokens("a<|im_end|>\n ")[-1] == EOS
    inner = encoder().answer_tokens("a<|im_end|>b")
    assert inner.count(EOS) == 2
    assert inner[-1] == EOS


def test_each_of_several_end_tokens_ends_an_answer():
    encode = encoder(eos=(259, EOS))
    assert encode.answer_tokens("a")[-1] == 259
    assert encode.answer_tokens("a<|im_end|>\n")[-1] == EOS


def test_never_joins_turns_as_plain_paragraphs():
    encode = encoder(chat_template="never")
    text, _ = encode.prompt(TURNS)
    assert text == "System: s\n\nUser: q\n\nAssistant: a\n\nUser: q2\n\nAssistant:"
    tokens, length = encode.sequence(TURNS, [assistant("a2")])
    assert decode(tokens[length:]) == " a2<|im_end|>"


def test_always_wraps_strings_into_turns():
    encode = encoder(chat_template="always")
    assert encode.sequence("q", "a") == encoder().sequence([user("q")], [assistant("a")])
    assert encode.sequence("", "a") == encoder().sequence("", "a")


def test_always_needs_a_template():
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(
        UserError, match=r"data\.chat_template is 'always', but the tokenizer has no chat template"
    ):
        Encoder(tokenizer, DataConfig(chat_template="always"), EOS)


def test_a_template_that_rewrites_the_prompt_is_refused():
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}" + tokenizer.chat_template
    with pytest.raises(BadRow, match="does not render the prompt as the beginning of prompt"):
        Encoder(tokenizer, DataConfig(), EOS).sequence([user("q")], [assistant("a")])


@pytest.mark.parametrize(
    ("text", "count", "parts"),
    [
        ("one two three", 2, ("one two", " three")),
        ("  one\ttwo\n", 1, ("  one", "\ttwo\n")),
        ("one two", 2, ("one two", "")),
        ("one two", 5, ("one two", "")),
        ("one two ", 0, ("", "one two ")),
    ],
)
def test_first_words(text, count, parts):
    assert first_words(text, count) == parts
