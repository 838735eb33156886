# SPDX-License-Identifier: Apache-2.0
"""The demo checkpoint: generated tokens equal transformers', and the metrics in card.json are reproduced."""

import json
import math

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from executor import LLM, SamplingParams
from executor.config import REPOSITORY
from ops.reference import ReferenceOps

DEMO = REPOSITORY / "models" / "qwen3_moe" / "demo"
CARD = json.loads((DEMO / "card.json").read_text(encoding="utf-8"))
PROMPTS = [
    "To be, or not to be, that is the question:",
    "ROMEO.\nWhat light is this",
    "Continue this scene:\n\nSCENE II. A wood near the castle.",
    "KING.\n",
]
MAX_BYTES = 14_000_000


@pytest.fixture(scope="module")
def llm():
    return LLM(DEMO, device="cpu", dtype="float32", batch_size=4)


@pytest.fixture(scope="module")
def transformers_model():
    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()


@torch.no_grad()
def generate(model, token_ids, new_tokens):
    """Greedy tokens of transformers, end tokens included."""
    inputs = torch.tensor([token_ids])
    output = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=new_tokens,
        do_sample=False,
        top_k=None,
        top_p=None,
    )
    return output[0, len(token_ids) :].tolist()


@pytest.mark.parametrize("chat", [False, True])
def test_greedy_tokens_equal_transformers(llm, transformers_model, chat):
    sampling = SamplingParams(max_new_tokens=100)
    if chat:
        outputs = llm.chat([[{"role": "user", "content": prompt}] for prompt in PROMPTS], sampling)
    else:
        outputs = llm.generate(PROMPTS, sampling)
    for output in outputs:
        assert output.token_ids == generate(transformers_model, output.prompt_token_ids, 100), output.prompt


def test_long_prompt_equals_transformers(llm, transformers_model):
    text = (DEMO / "heldout.txt").read_text(encoding="utf-8")
    token_ids = llm.tokenizer.tokenizer.encode(text)[:4080]
    [output] = llm.generate([token_ids], SamplingParams(max_new_tokens=16))
    assert output.token_ids == generate(transformers_model, token_ids, 16)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_error_is_no_larger_than_transformers(llm, dtype):
    text = (DEMO / "heldout.txt").read_text(encoding="utf-8")
    token_ids = llm.tokenizer.tokenizer.encode(text)[1000:1600]
    exact = llm.logits(token_ids)
    ours = LLM(DEMO, device="cpu", dtype=dtype).logits(token_ids)
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=getattr(torch, dtype)).eval()
    with torch.no_grad():
        theirs = model(torch.tensor([token_ids])).logits[0].float()
    assert (ours - exact).norm() <= 1.5 * (theirs - exact).norm()


class CountingOps(ReferenceOps):
    """Records the expert ids of every routing."""

    def __init__(self):
        super().__init__()
        self.ids = []

    def route(self, *arguments):
        result = super().route(*arguments)
        self.ids.append(result[2].topk_ids)
        return result


def test_card_figures(monkeypatch):
    ops = CountingOps()
    monkeypatch.setattr("executor.loading.assembly.load_ops", lambda device_type: ops)
    llm = LLM(DEMO, device="cpu", dtype="float32")
    text = (DEMO / "heldout.txt").read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    token_ids, start = tokenizer.encode(text), tokenizer.convert_tokens_to_ids("<|endoftext|>")
    nats = 0.0
    windows = [token_ids[first : first + 1024] for first in range(0, len(token_ids), 1024)]
    for window in windows:
        logits = llm.logits([start, *window[:-1]])
        nats += F.cross_entropy(logits, torch.tensor(window), reduction="sum").item()
    assert nats / math.log(2) / len(text) == pytest.approx(CARD["heldout_bits_per_char"], abs=0.003)

    num_layers, num_experts = llm.config.num_hidden_layers, llm.config.num_experts
    for layer, stated in enumerate(CARD["expert_shares"]):
        ids = torch.cat([one.flatten() for one in ops.ids[layer::num_layers]])
        shares = torch.bincount(ids, minlength=num_experts) / len(ids)
        torch.testing.assert_close(shares, torch.tensor(stated), atol=0.002, rtol=0)
        assert shares.min() > 0.01, f"an expert of layer {layer} gets hardly any tokens"


def test_checkpoint_size():
    assert sum(file.stat().st_size for file in DEMO.iterdir() if file.is_file()) <= MAX_BYTES
