"""Chat: incremental text, history by whole turns, the terminal loop."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_engine.chat import Conversation, Speaker, command, main, talk
from hybrid_engine.errors import UserError
from hybrid_engine.text_stream import TextStream, overlap
from tests.tiny import make_tiny_tokenizer


def byte_decode(tokens):
    return bytes(tokens).decode("utf-8", "replace")


def push_all(stream, tokens):
    return [stream.push(token) for token in tokens]


# --- text from tokens ---


def test_characters_of_several_tokens_come_whole():
    stream = TextStream(byte_decode)
    assert push_all(stream, "né€👋".encode()) == ["n", "", "é", "", "", "€", "", "", "", "👋"]
    assert stream.finish() == ""
    assert stream.text == "né€👋"


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30))
def test_pieces_add_up_to_the_text(text):
    stream = TextStream(byte_decode)
    pieces = push_all(stream, text.encode())
    assert "".join(pieces) + stream.finish() == text == stream.text
    assert all("\ufffd" not in piece or "\ufffd" in text for piece in pieces)


def test_half_a_character_at_the_end_is_shown_as_such():
    stream = TextStream(byte_decode)
    push_all(stream, "a€".encode()[:-1])
    assert stream.finish() == "\ufffd"
    assert stream.text == "a\ufffd"


def test_tokenizers_that_drop_the_first_space():
    words = ["▁Hello", "▁wor", "ld", "▁again"]

    def decode(tokens):
        return "".join(words[token] for token in tokens).replace("▁", " ").removeprefix(" ")

    stream = TextStream(decode)
    assert push_all(stream, range(4)) == ["Hello", " wor", "ld", " again"]


def test_tokens_without_text_are_passed_over():
    tokenizer = make_tiny_tokenizer()
    stream = TextStream(lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True))
    tokens = [*tokenizer("hé")["input_ids"], tokenizer.eos_token_id]
    assert "".join(push_all(stream, tokens)) + stream.finish() == "hé"


@settings(max_examples=200, deadline=None)
@given(st.text("ab\n", max_size=12), st.text("ab\n", min_size=1, max_size=4))
def test_stop_text_is_cut_off_and_never_shown(text, stop):
    stream = TextStream(byte_decode, stop)
    shown = ""
    for token in text.encode():
        shown += stream.push(token)
        assert stop not in shown
        if stream.stopped:
            break
    shown += stream.finish()
    assert shown == stream.text == text.partition(stop)[0]
    assert stream.stopped == (stop in text)


@given(st.text("ab", max_size=8), st.text("ab", min_size=1, max_size=5))
def test_overlap(text, stop):
    sizes = [size for size in range(len(stop)) if text.endswith(stop[:size])]
    assert overlap(text, stop) == max(sizes)


# --- history ---


def words(messages):
    """A word a token; the role is a token too."""
    return [word for message in messages for word in (message["role"], *message["content"].split())]


def conversation(room, system="be kind"):
    turns = [("one", "a b"), ("two", "c d"), ("three", "e f")]
    return Conversation(words, room, system, turns)


@pytest.mark.parametrize(
    "room, left_out", [(99, 0), (20, 0), (19, 1), (15, 1), (14, 2), (9, 3), (5, 3)]
)
def test_whole_turns_are_left_out_oldest_first_and_the_system_prompt_stays(room, left_out):
    tokens, missing = conversation(room).prompt("now")
    assert missing == left_out
    expected = [{"role": "system", "content": "be kind"}]
    for user, assistant in conversation(room).turns[left_out:]:
        expected += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    assert tokens == words([*expected, {"role": "user", "content": "now"}])
    assert len(tokens) <= room


def test_history_itself_is_kept():
    talk = conversation(9)
    talk.prompt("now")
    assert len(talk.turns) == 3


def test_message_longer_than_the_context():
    with pytest.raises(UserError, match=r"takes 8 tokens.*room for 5.*--max-new-tokens"):
        conversation(5).prompt("a b c d")


def test_without_a_system_prompt():
    assert Conversation(words, 9).prompt("hello")[0] == ["user", "hello"]


# --- the terminal loop ---


class Engine:
    """Says what it is told to, byte by byte; remembers the prompts and sample ids."""

    def __init__(self, *answers, interrupt_after=None):
        self.answers = list(answers)
        self.interrupt_after = interrupt_after
        self.prompts, self.sample_ids = [], []
        self.tokenizer = SimpleNamespace(decode=lambda tokens, **options: byte_decode(tokens))

    def generate(self, prompts, params, sample_ids, on_token):
        self.prompts.append(prompts[0])
        self.sample_ids += sample_ids
        for place, token in enumerate(self.answers.pop(0).encode()):
            if place == self.interrupt_after:
                raise KeyboardInterrupt
            on_token(0, token)


def converse(engine, lines, stop="", room=99):
    out = []
    script = iter(lines)

    def read():
        line = next(script, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    chat = Conversation(words, room)
    talk(chat, Speaker(engine, None, stop, out.append), read)
    return chat, "".join(out)


def test_answers_stream_and_are_remembered():
    engine = Engine(" Hi there\n", "Fine")
    chat, shown = converse(engine, ["hello", "", "how are you"])
    assert shown == "Hi there\n\nFine\n\n"
    assert chat.turns == [("hello", "Hi there"), ("how are you", "Fine")]
    assert engine.prompts[1] == [
        "user",
        "hello",
        "assistant",
        "Hi",
        "there",
        "user",
        "how",
        "are",
        "you",
    ]
    assert engine.sample_ids == [0, 1]


def test_stop_text_ends_generation():
    engine = Engine("Yes.\n\nUser: and then this would be the user's part")
    chat, shown = converse(engine, ["hello"], stop="\n\nUser:")
    assert shown == "Yes.\n\n"
    assert chat.turns == [("hello", "Yes.")]


def test_control_characters_are_not_obeyed():
    assert "\x1b" not in converse(Engine("a\x1b[2Jb"), ["hello"])[1]


def test_interrupting_an_answer_keeps_what_was_said():
    chat, shown = converse(Engine("Hello world", interrupt_after=5), ["hi", "/exit"])
    assert shown == "Hello [stopped]\n"
    assert chat.turns == [("hi", "Hello")]


def test_interrupting_before_the_first_word_leaves_no_turn():
    chat, _ = converse(Engine("Hello", interrupt_after=0), ["hi"])
    assert chat.turns == []


def test_interrupt_at_the_prompt_goes_on():
    chat, shown = converse(Engine("Fine"), [KeyboardInterrupt(), "hi"])
    assert "/exit" in shown
    assert chat.turns == [("hi", "Fine")]


def test_commands():
    chat, shown = converse(
        Engine("Fine"), ["hi", "/reset", "/help", "/what", "/exit", "never read"]
    )
    assert chat.turns == []
    assert "new conversation" in shown
    assert "unknown command /what" in shown
    assert shown.count("/reset") == 2
    assert command(chat, "/help") in shown


def test_too_long_a_message_is_refused_and_the_conversation_goes_on():
    chat, shown = converse(Engine("Fine"), ["a b c d e f", "hi"], room=4)
    assert "takes 7 tokens" in shown
    assert chat.turns == [("hi", "Fine")]


def test_full_context_is_said():
    chat, shown = converse(Engine("one", "two"), ["hi", "ho"], room=4)
    assert "no longer sees the first 1 turn" in shown
    assert len(chat.turns) == 2


# --- the program ---


def test_wrong_path_is_one_line(tmp_path, capsys):
    assert main([str(tmp_path / "absent")]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert "absent" in shown.err


def test_raw_needs_a_prompt(capsys):
    with pytest.raises(SystemExit):
        main(["path", "--raw"])
    assert "--raw needs --prompt" in capsys.readouterr().err


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory):
    from tests.tiny import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("tiny"), "llama")


def answer(capsys, path, *options):
    assert main([str(path), "--prompt", "Hello", "--max-new-tokens", "12", *options]) == 0
    return capsys.readouterr().out


def test_one_answer_equals_the_engines(tiny_path, capsys):
    from hybrid_engine.engine import HybridEngine, SamplingParams

    engine = HybridEngine.from_pretrained(tiny_path)
    prompt = engine.tokenizer("Hello", add_special_tokens=False)["input_ids"]
    rollout = engine.generate(
        [prompt], SamplingParams(max_new_tokens=12, temperature=0.0), sample_ids=[0]
    )
    text = engine.tokenizer.decode(rollout.tokens[0], skip_special_tokens=True)
    from hybrid_engine.report.text import printable

    assert answer(capsys, tiny_path, "--raw", "--temperature", "0") == printable(text) + "\n"


def test_weights_are_loaded_in_the_dtype_asked_for(tiny_path):
    from hybrid_engine.chat import arguments, load

    for options, dtype in ([], torch.float32), (["--dtype", "bfloat16"], torch.bfloat16):
        engine, _ = load(arguments([str(tiny_path), *options]))
        assert {parameter.dtype for parameter in engine.model.parameters()} == {dtype}


def test_an_adapter_talks(tiny_path, tmp_path, capsys):
    from hybrid_engine.models import LoRAConfig, adapted_linears, load_causal_lm, save_adapter

    model = load_causal_lm(tiny_path, lora=LoRAConfig(4, 64.0))
    for _, linear in adapted_linears(model):
        torch.nn.init.normal_(linear.lora_b)
    save_adapter(model, tmp_path / "adapter")
    greedy = ("--raw", "--temperature", "0")
    adapted = answer(capsys, tmp_path / "adapter", *greedy)
    assert adapted == answer(capsys, tmp_path / "adapter", *greedy, "--base-model", str(tiny_path))
    assert adapted != answer(capsys, tiny_path, *greedy)
    settings = tmp_path / "adapter" / "adapter_config.json"
    settings.write_text(settings.read_text().replace("base_sha256", "something"))
    assert main([str(tmp_path / "adapter"), "--prompt", "Hello", *greedy]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(adapted[:5])
    assert shown.err.startswith(f"warning: {settings} records no hash of its base")
    assert shown.err.count("\n") == 1
    assert main([str(tiny_path), "--prompt", "Hello", "--base-model", str(tiny_path)]) == 1
    assert "only an adapter takes a base" in capsys.readouterr().err


def test_seed_decides_the_answer(tiny_path, capsys):
    sampled = [
        answer(capsys, tiny_path, "--seed", seed, "--temperature", "1") for seed in ("1", "1", "2")
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_model_without_a_template_talks_in_paragraphs(tiny_path):
    from hybrid_engine.chat import NEXT_TURN, make_encode

    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = None
    encode, stop = make_encode(
        SimpleNamespace(tokenizer=tokenizer, eos_token_ids=(tokenizer.eos_token_id,))
    )
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert tokenizer.decode(encode(messages)) == "System: Be kind.\n\nUser: Hi\n\nAssistant:"
    assert stop == NEXT_TURN
