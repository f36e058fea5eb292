"""llama.cpp through its batch API: all sequences in one `llama_decode` a step, F16 KV cache."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import llama_cpp
import numpy as np
import torch
from torch import Tensor

PREFILL_TOKENS = 2048


class LlamaCpp:
    """Prompts of one length in, token lists out; sampling at temperature 1 is torch's."""

    def __init__(self, gguf: Path) -> None:
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(gguf).encode(), params)
        if self.model is None:
            raise RuntimeError(f"llama.cpp cannot load {gguf}")
        vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(vocab)

    def generate(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, greedy: bool = False
    ) -> list[list[int]]:
        context = self._context(len(prompts), len(prompts[0]) + new_tokens)
        try:
            return self._run(context, prompts, new_tokens, greedy)
        finally:
            llama_cpp.llama_free(context)

    def _context(self, batch: int, length: int) -> llama_cpp.llama_context_p:
        params = llama_cpp.llama_context_default_params()
        room = -(-length // 32) * 32
        params.n_ctx = batch * room
        params.n_batch = PREFILL_TOKENS
        params.n_seq_max = batch
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        context = llama_cpp.llama_init_from_model(self.model, params)
        if context is None:
            raise RuntimeError(f"llama.cpp cannot make a context of {batch} x {room} tokens")
        return context

    def _run(
        self,
        context: llama_cpp.llama_context_p,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        greedy: bool,
    ) -> list[list[int]]:
        batch = Batch(max(PREFILL_TOKENS, len(prompts)))
        length = len(prompts[0])
        together = max(1, PREFILL_TOKENS // length)
        first = []
        for begin in range(0, len(prompts), together):
            part = prompts[begin : begin + together]
            batch.clear()
            for i, prompt in enumerate(part):
                for at, token in enumerate(prompt):
                    batch.add(token, at, begin + i, wanted=at == length - 1)
            first.append(self._decode(context, batch, len(part), greedy))
        drawn = [torch.cat(first)]
        for at in range(length, length + new_tokens - 1):
            batch.clear()
            for sequence, token in enumerate(drawn[-1].tolist()):
                batch.add(token, at, sequence, wanted=True)
            drawn.append(self._decode(context, batch, len(prompts), greedy))
        batch.free()
        return torch.stack(drawn, 1).tolist()

    def _decode(
        self, context: llama_cpp.llama_context_p, batch: Batch, rows: int, greedy: bool
    ) -> Tensor:
        """Runs the batch and draws a token for each of its `rows` wanted places."""
        if status := llama_cpp.llama_decode(context, batch.raw):
            raise RuntimeError(f"llama_decode returned {status}")
        pointer = llama_cpp.llama_get_logits(context)
        logits = torch.from_numpy(np.ctypeslib.as_array(pointer, (rows, self.vocab_size)))
        if greedy:
            return logits.argmax(1)
        return torch.multinomial(logits.softmax(1), 1)[:, 0]


class Batch:
    """llama.cpp's batch struct."""

    def __init__(self, capacity: int) -> None:
        self.raw = llama_cpp.llama_batch_init(capacity, 0, 1)

    def clear(self) -> None:
        self.raw.n_tokens = 0

    def add(self, token: int, position: int, sequence: int, wanted: bool) -> None:
        """`wanted`: logits are computed after this token."""
        at = self.raw.n_tokens
        self.raw.token[at] = token
        self.raw.pos[at] = position
        self.raw.n_seq_id[at] = 1
        self.raw.seq_id[at][0] = sequence
        self.raw.logits[at] = wanted
        self.raw.n_tokens = at + 1

    def free(self) -> None:
        llama_cpp.llama_batch_free(self.raw)
