# SPDX-License-Identifier: Apache-2.0
"""The whole network on the Triton kernels, small, beside transformers; interpreted where there is no GPU."""

import os

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
pytest.importorskip("triton", reason="the kernels need triton")

from executor import LLM, SamplingParams  # noqa: E402
from ops.cuda import CudaOps, tiles  # noqa: E402
from ops.cuda.triton_internals import COMPILES_NARROW_DOT  # noqa: E402
from tests.checkpoints import make_checkpoint, make_model, reference_logits, rounded  # noqa: E402
from tests.engine.engines import reset  # noqa: E402
from tests.logits import decode_logits, relative_error  # noqa: E402

KERNELS = {
    *("LinearCall", "NormLinearCall", "RouteCall", "ExpertsCall", "BatchedExpertsCall", "GroupedExpertsCall"),
    *("DecodeAttentionCall", "partial"),  # the latter binds attention of a prefill
}
NEW_TOKENS = 3
TOLERANCE = 1e-2
KERNELS_FOR_ALL = {  # widths are powers of two; where every expert is chosen, no rounding decides which are
    "hidden_size": 64,
    "num_attention_heads": 4,
    "head_dim": 32,
    "num_hidden_layers": 1,
    "num_experts": 4,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 32,
    "vocab_size": 256,
}
CHOOSING = {"num_experts": 8, "num_experts_per_tok": 2}
MIXED = {
    "num_hidden_layers": 2,
    "attention_bias": True,
    "norm_topk_prob": False,
    "tie_word_embeddings": True,
    "mlp_only_layers": [0],
}
# the config, lengths of prompts, a seed: one prompt long enough for two splits of the cache, or few tokens and a seed
# with which no experts are so close that rounding decides
MODELS = {
    "kernels_for_all": (KERNELS_FOR_ALL, [130, 1, 17], 5),
    "mixed": (KERNELS_FOR_ALL | CHOOSING | MIXED, [5, 1, 17], 5),
    "odd_widths": ({"num_hidden_layers": 1}, [5, 1, 17], 29),  # plain torch between kernels
}


def tile_of_many_rows(n: int, k: int) -> tiles.GemvTile:
    rows = tiles.power_of_two_factor(n, 4)
    return tiles.GemvTile(rows, tiles.power_of_two_factor(n // rows, 4), 8)


@pytest.fixture(autouse=True)
def programs_of_many_rows(monkeypatch):
    """As large matrices have them: small ones have a program a row, each of which takes the interpreter 10 ms."""
    if not ON_GPU:
        monkeypatch.setattr("ops.cuda.linear.gemv_tile", tile_of_many_rows)


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(name, tmp_path, monkeypatch):
    """Prefill and decode, one sequence and several; chunks of a prompt."""
    config, lengths, seed = MODELS[name]
    reference = rounded(make_checkpoint(tmp_path, seed, **config), torch.float16)
    monkeypatch.setattr("executor.loading.assembly.load_ops", lambda device_type: CudaOps())
    llm = LLM(
        tmp_path,
        "cuda" if ON_GPU else "cpu",
        dtype="float16",  # the interpreter multiplies bfloat16 matrices as integers
        input_max_len=max(lengths),
        max_new_tokens=NEW_TOKENS,
        batch_size=len(lengths),
        prefix_cache=False,
    )
    torch.manual_seed(seed)
    prompts = [torch.randint(0, llm.config.vocab_size, (length,)).tolist() for length in lengths]
    for batch in (prompts[-1:], prompts):
        sequences, decoded = decode_logits(llm, batch, NEW_TOKENS)
        for sequence, from_decode in zip(sequences, decoded, strict=True):
            expected = reference_logits(reference, sequence)
            assert relative_error(from_decode, expected[-NEW_TOKENS:-1]) < TOLERANCE
    bound = {type(call).__name__ for call in llm.ops.calls.values()}
    if name == "kernels_for_all":
        assert bound == KERNELS
    if name == "odd_widths" and COMPILES_NARROW_DOT:
        assert {"MatmulCall", "NormMatmulCall"} <= bound
    longest = max(sequences, key=len)
    reset(llm, max_step_tokens=len(longest) * 3 // 4)  # a chunk on cached context
    assert relative_error(llm.logits(longest), reference_logits(reference, longest)) < TOLERANCE


def test_a_prompt_that_fails_changes_no_other(tmp_path, monkeypatch):
    """Its neighbours in packed prefills, chunks and decode steps get the tokens they get alone, as do later prompts."""
    damaged, config = 7, KERNELS_FOR_ALL | CHOOSING | {"num_experts": 6}  # no power of two
    model = make_model(5, **config)
    with torch.no_grad():
        model.model.embed_tokens.weight[damaged] = float("nan")
        model.lm_head.weight[damaged] = 0
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("executor.loading.assembly.load_ops", lambda device_type: CudaOps())
    settings = {"dtype": "float16", "input_max_len": 64, "max_new_tokens": NEW_TOKENS, "batch_size": 3}
    llm = LLM(tmp_path, "cuda" if ON_GPU else "cpu", cache_tokens=384, **settings)
    params = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    torch.manual_seed(5)
    prompts = [torch.randint(8, llm.config.vocab_size, (length,)).tolist() for length in (3, 9, 5)]
    alone = [llm.generate([prompt], params)[0].token_ids for prompt in prompts]
    reset(llm, batch_size=3, max_step_tokens=12, runs_ahead=True)  # the second prompt is not computed at once
    found = llm.generate([prompts[0], [20, damaged, 30, 40], *prompts[1:]], params)
    assert [output.finish_reason for output in found] == ["length", "error", "length", "length"]
    assert [output.token_ids for output in found] == [alone[0], [], *alone[1:]]
    with pytest.raises(ValueError, match="position 1 "):
        llm.logits([20, damaged, 30])
