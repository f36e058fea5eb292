"""ALiBi has no family yet: the decoder against the paper's formula, written densely in fp64."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hybrid_engine.models import Decoder, pack, spec_from_hf, unpack
from hybrid_engine.models.decoder import Block, alibi_slopes

from .peers import LAYOUTS, ragged


def dense_attention(block: Block, x: Tensor) -> Tensor:
    """softmax(q k^T scale - slope (i - j)) v of one sequence ``[T, h]``, without shared heads."""
    spec, length = block.spec, x.shape[0]
    qkv = x @ block.qkv.weight.T + block.qkv.bias
    q, k, v = (part.view(length, spec.heads, -1).transpose(0, 1) for part in qkv.chunk(3, -1))
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    scores = q @ k.mT * spec.attention_scale - alibi_slopes(spec.heads)[:, None, None] * distance
    attended = scores.masked_fill(distance < 0, -torch.inf).softmax(-1) @ v
    return attended.transpose(0, 1).flatten(1) @ block.attn_out.weight.T + block.attn_out.bias


def test_attention_falls_with_distance() -> None:
    learned = spec_from_hf(LAYOUTS["opt"].config())
    spec = replace(learned, positions="alibi", position_offset=0, num_layers=1)
    torch.manual_seed(0)
    decoder = Decoder(spec)
    batch = pack(ragged())
    x = torch.randn(batch.num_tokens, spec.hidden_size) * 3
    with torch.no_grad():
        ours = decoder.blocks[0].attend(x, decoder._context(batch))
        block = decoder.double().blocks[0]
        exact = torch.cat([dense_attention(block, part.double()) for part in unpack(x, batch)])
    # values of order one; a missing or reversed bias changes them by more than 0.1
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=1e-5)
