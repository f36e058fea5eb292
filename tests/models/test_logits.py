"""Our decoder against transformers' own modules: logits and gradients of every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hybrid_engine.errors import UserError
from hybrid_engine.models import load_causal_lm, pack, response_rows

from .peers import (
    CONTEXT,
    LAYOUTS,
    ONE_OF_EACH_FAMILY,
    padded,
    peer_logits,
    ragged,
    save_causal,
    worst_logit_gap,
)

# The bound. Logits here are of order one and fp32 sums of 72 terms differ by a few ulp, so
# anything near it would be a different formula.
LOGIT_TOLERANCE = 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_equal_transformers(
    layout: str, tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    peer = save_causal(layout, tmp_path)
    model = load_causal_lm(tmp_path)
    worst = max(worst_logit_gap(model, peer, ragged(), side) for side in ("left", "right"))
    record_property("worst_logit_gap", worst)
    assert worst <= LOGIT_TOLERANCE


@pytest.mark.parametrize("layout", ["llama-rope-yarn", "opt", "gpt2"])
def test_a_full_context_is_accepted_and_one_more_is_refused(layout: str, tmp_path: Path) -> None:
    peer = save_causal(layout, tmp_path)
    model = load_causal_lm(tmp_path)
    whole = ragged(lengths=(CONTEXT,))
    assert worst_logit_gap(model, peer, whole, "right") <= LOGIT_TOLERANCE
    with pytest.raises(UserError, match=f"{CONTEXT + 1} tokens exceeds the model's context"):
        model.logits(pack(ragged(lengths=(CONTEXT + 1,))))


@pytest.mark.parametrize("layout", ONE_OF_EACH_FAMILY)
def test_scores_are_the_log_softmax_of_transformers_logits(layout: str, tmp_path: Path) -> None:
    peer = save_causal(layout, tmp_path).double()
    model = load_causal_lm(tmp_path)
    sequences, prompts, temperature = ragged(), [3, 1, 16, 1], 0.7
    batch = pack(sequences)
    rows, targets = response_rows(batch, prompts)
    scores = model(batch, rows, targets, temperature)

    exact_logprobs, exact_entropies = [], []
    for tokens, prompt in zip(sequences, prompts, strict=True):
        logits = peer(torch.tensor([tokens])).logits[0, prompt - 1 : -1] / temperature
        table = logits.log_softmax(-1)
        exact_logprobs.append(table.gather(1, torch.tensor(tokens[prompt:])[:, None]).squeeze(1))
        exact_entropies.append(-(table.exp() * table).sum(-1))
    assert rows.shape[0] == sum(map(len, sequences)) - sum(prompts)
    torch.testing.assert_close(
        scores.logprobs.double(), torch.cat(exact_logprobs), rtol=0, atol=LOGIT_TOLERANCE
    )
    torch.testing.assert_close(
        scores.entropies.double(), torch.cat(exact_entropies), rtol=0, atol=LOGIT_TOLERANCE
    )


@pytest.mark.filterwarnings("ignore:hybrid_kernels")
@pytest.mark.parametrize("layout", ONE_OF_EACH_FAMILY)
def test_bfloat16_is_more_accurate_than_transformers(layout: str, tmp_path: Path) -> None:
    """Measured from fp64, of the same rounded weights. Ours keeps activations in float32."""
    peer = save_causal(layout, tmp_path)
    frequencies = {name: buffer.clone() for name, buffer in peer.named_buffers()}
    batch = pack(ragged())
    with torch.no_grad():
        theirs = torch.cat(peer_logits(peer.bfloat16(), ragged(), "right")).double()
        # The same rounded weights, computed exactly: rotary frequencies are none of them, and the
        # cast above rounded those too.
        for name, buffer in peer.double().named_buffers():
            buffer.copy_(frequencies[name])
        exact = torch.cat(peer_logits(peer, ragged(), "right"))
        ours = load_causal_lm(tmp_path, "bfloat16").logits(batch)
    assert ours.dtype == torch.float32
    # Eps of float32 is 2^-16 of bfloat16's; the bound leaves a factor of 16 for what is not rounded
    # to the storage dtype in theirs.
    assert (ours.double() - exact).norm() <= 2**-12 * (theirs - exact).norm()


def _next_token_loss_gradients(
    peer: torch.nn.Module, sequences: list[list[int]]
) -> dict[str, torch.Tensor]:
    inputs = padded(sequences, "right")
    logits = peer(**inputs).logits[:, :-1]
    mask = inputs["attention_mask"][:, 1:].bool()
    loss = torch.nn.functional.cross_entropy(
        logits[mask], inputs["input_ids"][:, 1:][mask], reduction="sum"
    )
    loss.backward()
    return {name: parameter.grad for name, parameter in peer.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "recomputed"])
@pytest.mark.parametrize("layout", ["llama-biases", "mistral-window", *ONE_OF_EACH_FAMILY])
def test_gradients_equal_transformers_autograd(
    layout: str, checkpointing: bool, tmp_path: Path
) -> None:
    """Compared in transformers' names: gradients travel through the same splits as weights."""
    plain = save_causal(layout, tmp_path)
    exact = _next_token_loss_gradients(save_causal(layout, tmp_path / "again").double(), ragged())
    theirs = _next_token_loss_gradients(plain, ragged())
    model = load_causal_lm(tmp_path)
    model.gradient_checkpointing = checkpointing
    batch = pack(ragged())
    rows, targets = response_rows(batch, [1] * batch.num_sequences)
    (-model(batch, rows, targets).logprobs.sum()).backward()

    ours = gradients_in_checkpoint_names(model)
    assert ours.keys() == exact.keys()
    for name, reference in exact.items():
        scale = reference.abs().max()
        error = (ours[name].double() - reference).abs().max() / scale
        plain_error = (theirs[name].double() - reference).abs().max() / scale
        # Another order of fp32 sums may be a few times worse than torch's, never a different value.
        assert error <= 8 * plain_error + 1e-6, name


def gradients_in_checkpoint_names(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Put gradients where the weights are, and read them out under transformers' names."""
    from hybrid_engine.models.saving import checkpoint_tensors

    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.copy_(parameter.grad)
    return dict(checkpoint_tensors(model))


def test_rows_of_one_sequence_do_not_depend_on_the_rest_of_the_batch(tmp_path: Path) -> None:
    save_causal("llama", tmp_path)
    model = load_causal_lm(tmp_path)
    sequences = ragged()
    with torch.no_grad():
        together = model.logits(pack(sequences))
        start = len(sequences[0]) + len(sequences[1])
        alone = model.logits(pack([sequences[2]]))
    assert torch.allclose(together[start : start + len(sequences[2])], alone, rtol=0, atol=1e-5)
