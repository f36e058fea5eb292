"""The loss of a conversation counts every turn of the assistant and nothing else."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from hybrid_engine.config import DataConfig, PPOConfig
from hybrid_engine.data import SFTExample, load_stage
from hybrid_engine.models import load_causal_lm
from hybrid_engine.rl.metrics import Averages
from hybrid_engine.stages.sft import evaluate, train_step
from hybrid_engine.stages.update import Updater
from tests.stages.runs import Trainer, metrics, summary
from tests.tiny import make_tiny_tokenizer

EOS = 257
PASS = 120  # tokens, so that a batch takes several


class Trained:
    """A model with gradients as TrainEngine accumulates them, and no optimizer."""

    lr = 0.0

    def __init__(self, module):
        self.module = module

    def __call__(self, *arguments):
        return self.module(*arguments)

    def backward(self, loss, normaliser):
        (loss / normaliser).backward()

    def step(self):
        return 0.0


def conversation(i):
    """Of one to three turns; each answer says its own words."""
    turns = [
        {"role": role, "content": f"{role} {i} {turn} " + "word " * ((i + turn) % 3)}
        for turn in range(i % 3 + 1)
        for role in ("user", "assistant")
    ]
    return {"messages": turns}


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "conversations.jsonl"
    path.write_text("".join(json.dumps(conversation(i)) + "\n" for i in range(40)))
    return path


@pytest.fixture(scope="module")
def examples(conversations) -> list[SFTExample]:
    config = DataConfig(path=(str(conversations),), split=(1, 0, 0))
    return load_stage(config, "sft", make_tiny_tokenizer(), 0, EOS).train[:6]


def peer_loss(model, examples):
    """By transformers: cross-entropy with every token masked that is not the assistant's.

    Tokens are counted here from the text itself: ``<|im_start|>assistant\\n ... <|im_end|>``.
    """
    total, count = torch.zeros(()), 0
    header = make_tiny_tokenizer()("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    for example in examples:
        labels, at = [-100] * len(example.tokens), 0
        while at < len(example.tokens):
            if example.tokens[at : at + len(header)] != header:
                at += 1
                continue
            at += len(header)
            end = example.tokens.index(EOS, at) + 1
            labels[at:end] = example.tokens[at:end]
            count += end - at
            at = end
        logits = model(torch.tensor([example.tokens])).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(
            logits, torch.tensor(labels[1:]), reduction="sum"
        )
    return total / count


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_the_loss_and_its_gradient_are_those_of_transformers(tiny_model, examples):
    assert max(len(example.spans) for example in examples) > 1
    peer = AutoModelForCausalLM.from_pretrained(tiny_model)
    loss = peer_loss(peer, examples)
    loss.backward()
    trained = Trained(load_causal_lm(tiny_model))
    values = train_step(trained, examples, PASS)
    assert values["loss"] == pytest.approx(loss.item(), rel=1e-5)
    wanted = peer.model.layers[0].mlp.down_proj.weight.grad
    ours = gradients(trained.module)["decoder.blocks.0.mlp_out.weight"]
    torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-6)
    assert evaluate(trained, examples, PASS)["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_demonstrations_have_the_gradient_of_step_1(tiny_model, examples):
    step_1 = Trained(load_causal_lm(tiny_model))
    loss = train_step(step_1, examples, PASS)["loss"]
    policy = Trained(load_causal_lm(tiny_model))
    config = PPOConfig(ptx_coef=0.5, max_tokens_per_pass=PASS)
    averages = Averages()
    Updater(SimpleNamespace(policy=policy), config)._demonstration_passes(examples, averages)
    for name, gradient in gradients(policy.module).items():
        torch.testing.assert_close(gradient, 0.5 * gradients(step_1.module)[name], msg=name)
    assert averages.result(lambda value: [value])["ptx_loss"] == pytest.approx(loss, rel=1e-5)


def test_conversations_train_steps_1_and_3(trainer, conversations, tmp_path):
    reward = tmp_path / "reward.py"
    reward.write_text("def f(completions): return [float(len(c)) for c in completions]\n")
    settings = {
        **trainer.settings,
        "data.max_length": 200,
        "data.max_prompt_tokens": 150,
        "rlhf.ptx_coef": 0.3,
        "judge.rewards": f"{reward}:f",
    }
    chatty = Trainer(trainer.model, conversations, settings)
    output = chatty(tmp_path / "output", "--steps", "1", "3", "--reward-model", str(trainer.model))
    results = summary(output)["sft"]
    assert results["heldout_loss_after"] < results["heldout_loss_before"]
    assert all(line["ptx_loss"] > 0 for line in metrics(output, "rlhf"))
