"""Every turn of the assistant is a target with its end token, whatever the template."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_engine.config import DataConfig
from hybrid_engine.data.encode import Encoder
from hybrid_engine.data.records import BadRow
from hybrid_engine.data.turns import marked_spans, up_to_the_last_answer
from tests.data.files import assistant, system, user
from tests.tiny import CHATML, make_tiny_tokenizer

EOS = 257
END = "<|im_end|>"
TURNS = [system("s"), user("q"), assistant("a"), user("q2"), assistant("a2")]
NEXT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def template(answer):
    """ChatML whose assistant turns are rendered by ``answer`` after their header."""
    return (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['role'] == 'assistant' %}"
        + answer
        + "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        + NEXT
    )


TAGGED = {
    "end inside": template(
        "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    ),
    "end outside": template(
        "{%- generation -%}{{ message['content'] }}{%- endgeneration -%}{{ '<|im_end|>\n' }}"
    ),
}
# As Qwen3 does, which shows its reasoning in the last turn only.
LAST_DIFFERS = template(
    "{% if loop.last %}{{ '<think></think>' }}{% endif %}{{ message['content'] + '<|im_end|>\n' }}"
)


def encoder(chat_template=CHATML, style="auto", eos=EOS, add_bos=False, **config):
    tokenizer = make_tiny_tokenizer(add_bos=add_bos)
    tokenizer.chat_template = chat_template
    return Encoder(tokenizer, DataConfig(chat_template=style, **config), eos)


def decode(tokens):
    return make_tiny_tokenizer().decode(tokens)


def targets(encoded):
    tokens, spans = encoded
    return [decode(tokens[begin:end]) for begin, end in spans]


@pytest.mark.parametrize("style", ["auto", "always"])
@pytest.mark.parametrize(
    "chat_template", [CHATML, *TAGGED.values()], ids=["prefix", *TAGGED.keys()]
)
def test_each_turn_is_learnt_with_its_end(chat_template, style):
    tokens, spans = encoder(chat_template, style).conversation(TURNS)
    assert targets((tokens, spans)) == [f"a{END}", f"a2{END}"]
    rendered = make_tiny_tokenizer().apply_chat_template(TURNS, tokenize=False)
    assert decode(tokens) == rendered.removesuffix("\n")


def test_marks_are_those_of_transformers():
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = TAGGED["end inside"]
    peer = tokenizer.apply_chat_template(TURNS, return_dict=True, return_assistant_tokens_mask=True)
    tokens, spans = encoder(TAGGED["end inside"]).conversation(TURNS)
    assert tokens == peer["input_ids"][: len(tokens)]
    wanted = [i for i, one in enumerate(peer["assistant_masks"]) if one]
    assert [i for begin, end in spans for i in range(begin, end)] == wanted


def test_marks_decide_over_prefixes():
    """What a template writes for the assistant without marking it carries no loss."""
    marked = template(
        "{{ '<think></think>' }}{% generation %}{{ message['content'] + '<|im_end|>' }}"
        "{% endgeneration %}"
    )
    assert targets(encoder(marked).conversation(TURNS)) == [f"a{END}", f"a2{END}"]


CONVERSATIONS = st.lists(st.tuples(st.text("ab \n", min_size=1), st.text("cd \n", min_size=1)))


@given(CONVERSATIONS.filter(bool), st.booleans())
def test_before_each_turn_stands_its_prompt(pairs, add_bos):
    messages = [message for q, a in pairs for message in (user(q), assistant(a))]
    encode = encoder(add_bos=add_bos, max_length=10_000)
    tokens, spans = encode.conversation(messages)
    assert targets((tokens, spans)) == [a + END for _, a in pairs]
    for turn, (begin, _) in enumerate(spans):
        assert tokens[:begin] == encode.prompt(messages[: 2 * turn + 1])[1]
    assert encode.opening_length(messages) == spans[0][0]
    whole, length = encode.sequence(messages[:-1], messages[-1:])
    assert (whole, length) == (tokens, spans[-1][0])  # of one turn it is the prompt and the answer


def test_an_end_token_that_the_model_does_not_declare_is_learnt_too():
    assert targets(encoder(eos=259).conversation(TURNS)) == [
        f"a{END}\n",
        f"a2{END}\n<|endoftext|>",
    ]


def test_a_last_turn_unlike_the_others():
    tokens, spans = encoder(LAST_DIFFERS).conversation(TURNS)
    assert targets((tokens, spans)) == [f"a{END}", f"<think></think>a2{END}"]


def test_never_learns_what_the_assistant_says():
    tokens, spans = encoder(style="never", add_bos=True).conversation(TURNS)
    assert decode(tokens) == (
        "<|im_start|>System: s\n\nUser: q\n\nAssistant: a\n\nUser: q2\n\nAssistant: a2<|im_end|>"
    )
    assert targets((tokens, spans)) == [" a", f" a2{END}"]
    tagged = encoder(TAGGED["end inside"], style="never", add_bos=True)
    assert tagged.conversation(TURNS) == (tokens, spans)


@pytest.mark.parametrize("chat_template", [CHATML, TAGGED["end outside"]], ids=["prefix", "marks"])
def test_the_limit_cuts_turns(chat_template):
    tokens, spans = encoder(chat_template, max_length=512).conversation(TURNS)
    for limit in range(spans[0][0] + 1, len(tokens) + 1):
        cut = encoder(chat_template, max_length=limit, max_prompt_tokens=1).conversation(TURNS)
        assert cut[0] == tokens[: cut[1][-1][1]]
        assert len(cut[0]) <= limit
        kept = [i for begin, end in spans for i in range(begin, end) if i < limit]
        assert [i for begin, end in cut[1] for i in range(begin, end)] == kept


def test_a_greeting_answers_nothing():
    greeting = [assistant("hello"), user("q"), assistant("a")]
    assert targets(encoder().conversation(greeting)) == [f"a{END}"]
    assert up_to_the_last_answer(greeting) == greeting
    assert up_to_the_last_answer(greeting[:2]) == []
    # Marks may say otherwise, but nothing precedes the first token to predict it.
    bare = (
        "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"
    )
    assert encoder(bare).conversation(greeting)[1][0][0] == 1


def test_turns_in_a_row_are_two_answers():
    messages = [user("q"), assistant("a"), assistant("b")]
    assert targets(encoder().conversation(messages)) == [f"a{END}", f"b{END}"]


def test_a_template_that_rewrites_the_beginning_is_refused():
    rewriting = "{{ messages | length }}" + CHATML
    for method in (encoder(rewriting).conversation, encoder(rewriting).opening_length):
        with pytest.raises(BadRow, match="does not render the prompt as the beginning"):
            method(TURNS)


def test_a_last_turn_unlike_the_others_needs_an_end_token():
    with pytest.raises(BadRow, match="does not render the prompt as the beginning"):
        encoder(LAST_DIFFERS, eos=259).conversation(TURNS)


def test_marks_around_nothing_are_refused():
    nothing = template("{% if false %}{% generation %}{% endgeneration %}{% endif %}")
    with pytest.raises(BadRow, match=r"marks no part of this conversation as generated"):
        encoder(nothing).opening_length(TURNS)


@pytest.mark.parametrize(
    ("mask", "tokens", "spans"),
    [
        ([], [], []),
        ([0, 0], [1, 9], []),
        ([1, 1, 0], [1, 2, 9], [(0, 3)]),
        ([0, 1, 0, 1], [1, 9, 9, 3], [(1, 2), (3, 4)]),  # one end is enough
        ([0, 1, 0, 0, 1], [9, 1, 2, 9, 3], [(1, 2), (4, 5)]),
    ],
)
def test_marked_spans(mask, tokens, spans):
    assert marked_spans(mask, tokens, (9,)) == spans
