# SPDX-License-Identifier: Apache-2.0
"""The whole model on one or two GPUs: logits close to transformers', equal tokens in eager and graph mode."""

import itertools

import pytest
import torch
from transformers import Qwen3MoeForCausalLM

from executor.config import REPOSITORY
from executor.engine.model_runner import ModelRunner
from executor.llm import LLM
from executor.sampling_params import SamplingParams
from tests.checkpoints import reference_logits
from tests.engine.engines import reset
from tests.logits import decode_logits, relative_error
from tests.parallel.ranks import run_ranks, settings_of
from tests.quantized_checkpoints import CONFIG, FORMATS, quantize, quantize_static

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

DEMO = REPOSITORY / "models" / "qwen3_moe" / "demo"
SHAPE_30B = REPOSITORY / "models" / "qwen3_moe" / "shapes" / "qwen3_30b_a3b"
TEXT_LENGTHS = [5, 40, 130, 300]
MORE_THAN_TRANSFORMERS = 1.5  # maximum ratio of the errors, both bfloat16 against float32
MODES = ("eager", "graph")
# attn_tp, moe_tp, embed_tp, lmhead_tp of two ranks
LAYOUTS = {"2tp": (2, 2, 2, 2), "2ep": (2, 1, 2, 2), "2dp_2ep": (1, 1, 1, 1), "2dp_2tp": (1, 2, 2, 2)}


def texts(llm: LLM) -> list[list[int]]:
    """Slices of the held-out text with TEXT_LENGTHS tokens."""
    text = (DEMO / "heldout.txt").read_text(encoding="utf-8")
    return [llm.tokenizer.encode(text[1200 * i :][:1200])[:length] for i, length in enumerate(TEXT_LENGTHS)]


def transformers_logits(dtype: torch.dtype, sequences: list[list[int]]) -> list[torch.Tensor]:
    model = Qwen3MoeForCausalLM.from_pretrained(DEMO, dtype=dtype).to("cuda").eval()
    return [reference_logits(model, sequence).cpu() for sequence in sequences]


def exact_logits(sequences: list[list[int]]) -> tuple[list[torch.Tensor], float]:
    """float32 logits, and the error of transformers' bfloat16 logits."""
    exact, theirs = (transformers_logits(dtype, sequences) for dtype in (torch.float32, torch.bfloat16))
    return exact, relative_error(torch.cat(theirs), torch.cat(exact))


@pytest.mark.parametrize("exe_mode", MODES)
def test_logits_of_the_demo(exe_mode):
    """Prefill, decode and chunks, each text alone and all at once."""
    new_tokens = 24
    llm = LLM(
        DEMO,
        "cuda",
        exe_mode=exe_mode,
        input_max_len=512,
        max_new_tokens=new_tokens,
        batch_size=4,
        prefix_cache=False,
    )
    prompts = texts(llm)
    assert [len(prompt) for prompt in prompts] == TEXT_LENGTHS
    alone = [decode_logits(llm, [prompt], new_tokens) for prompt in prompts]
    together = decode_logits(llm, prompts, new_tokens)
    sequences = [sequence for [sequence], _ in alone] + together[0]
    decoded = torch.cat([logits for _, [logits] in alone] + together[1])
    exact, their_error = exact_logits(sequences)
    in_decode = torch.cat([logits[-new_tokens:-1] for logits in exact])
    errors = {"decode": relative_error(decoded, in_decode)}
    for name, max_step_tokens in (("prefill", 8192), ("chunks", 50)):
        reset(llm, max_step_tokens=max_step_tokens)
        found = torch.cat([llm.logits(sequence) for sequence in sequences])
        errors[name] = relative_error(found, torch.cat(exact))
    print(f"\n{exe_mode}: relative errors {errors}, transformers {their_error}")
    assert max(errors.values()) <= MORE_THAN_TRANSFORMERS * their_error


def results_of_layouts(new_tokens: int) -> dict[tuple, tuple[list[list[int]], list[torch.Tensor]]]:
    """For each layout, batch size and mode: all sequences, and the decode logits of those on this rank."""
    results = {}
    for layout, sizes in LAYOUTS.items():
        for exe_mode in MODES:
            settings = {"exe_mode": exe_mode, "input_max_len": 512, "batch_size": 4, "cache_tokens": 4096}
            llm = LLM(DEMO, "cuda", prefix_cache=False, **settings, **settings_of(sizes, world_size=2))
            prompts = texts(llm)
            for batch in (prompts[:1], prompts):
                results[layout, len(batch), exe_mode] = decode_logits(llm, batch, new_tokens)
    return results


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two GPUs")
def test_layouts_of_two_gpus(tmp_path):
    """With one prompt, one of two attention DP groups is idle."""
    new_tokens = 24
    ranks = run_ranks(2, results_of_layouts, tmp_path, new_tokens)
    for layout, count in itertools.product(LAYOUTS, (1, len(TEXT_LENGTHS))):
        sequences = ranks[0][layout, count, "eager"][0]
        exact, their_error = exact_logits(sequences)
        dp_size = 2 // LAYOUTS[layout][0]
        for rank, exe_mode in itertools.product((0, 1), MODES):
            found, decoded = ranks[rank][layout, count, exe_mode]
            assert found == sequences, (layout, count, exe_mode, rank)
            own = [logits[-new_tokens:-1] for logits in exact[rank % dp_size :: dp_size]]
            assert len(decoded) == len(own)
            if own:
                error = relative_error(torch.cat(decoded), torch.cat(own))
                print(f"\n{layout}, {count}, {exe_mode}, rank {rank}: error {error}, transformers {their_error}")
                assert error <= MORE_THAN_TRANSFORMERS * their_error


@pytest.mark.parametrize(
    ("model_path", "prompt_tokens"), [(DEMO, [64, 200]), (SHAPE_30B, [64, 4080])], ids=["demo", "30b"]
)
def test_eager_and_graph_choose_the_same_tokens(model_path, prompt_tokens):
    """The 30B shape with all 48 layers, random weights. Twelve sequences take the graph of 16: four rows of padding."""
    free_gb = torch.cuda.mem_get_info()[0] / 1e9
    if model_path == SHAPE_30B and free_gb < 70:
        pytest.skip(f"needs 70 GB of free memory, {free_gb:.0f} are there")
    new_tokens = 129
    llm = LLM(
        model_path,
        "cuda",
        with_ckpt=model_path == DEMO,
        exe_mode="graph",
        input_max_len=max(prompt_tokens),
        max_new_tokens=new_tokens,
        batch_size=16,
        prefix_cache=False,
    )
    assert 12 not in llm.runner.graphs
    eager = ModelRunner(llm.model, llm.kv_caches, llm.parallel, False, llm.device, 16, llm.max_len)
    generator = torch.Generator().manual_seed(0)
    for length in prompt_tokens:
        for batch_size in (1, 2, 3, 4, 5, 8, 12) if length == prompt_tokens[0] else (1, 4):
            prompts = torch.randint(0, llm.config.vocab_size, (batch_size, length), generator=generator).tolist()
            tokens = []
            for runner in (llm.runner, eager):
                llm.engine.runner = runner
                outputs = llm.generate(prompts, SamplingParams(max_new_tokens=new_tokens, ignore_eos=True))
                tokens.append([output.token_ids for output in outputs])
            assert tokens[0] == tokens[1], (length, batch_size)
            assert len({tuple(row) for row in tokens[0]}) == batch_size  # distinct prompts, so distinct outputs


@pytest.mark.parametrize("exe_mode", MODES)
def test_requests_beside_each_other(exe_mode):
    """Chunks beside decode tokens, prefixes, a step ahead: each chosen token is the most likely one, or nearly so."""
    llm = LLM(DEMO, "cuda", exe_mode=exe_mode, input_max_len=512, max_new_tokens=32, batch_size=4, cache_tokens=4096)
    assert llm.engine.runs_ahead
    reset(llm, batch_size=3, max_step_tokens=100, chunk_tokens=40, runs_ahead=True)
    prompts = texts(llm) * 2
    outputs = llm.generate(prompts, SamplingParams(max_new_tokens=32, ignore_eos=True))
    assert sum(output.num_cached_tokens for output in outputs) > sum(TEXT_LENGTHS) - 20 * len(TEXT_LENGTHS)
    assert not any(llm.engine.schedulers[0].pool.references)
    sequences = [prompt + output.token_ids for prompt, output in zip(prompts, outputs, strict=True)]
    exact, theirs = (transformers_logits(dtype, sequences) for dtype in (torch.float32, torch.bfloat16))
    their_error = max((one - other).abs().max() for one, other in zip(exact, theirs, strict=True))
    for prompt, output, logits in zip(prompts, outputs, exact, strict=True):
        rows = logits[len(prompt) - 1 : -1]
        chosen = rows.gather(1, torch.tensor(output.token_ids)[:, None])[:, 0]
        assert (rows.amax(-1) - chosen).max() <= 2 * MORE_THAN_TRANSFORMERS * their_error


@pytest.mark.parametrize("name", ["awq", "w4a16", "fp8", "w8a8", "modelslim_static"])
def test_quantised_checkpoints(name, tmp_path):
    """Prefill and decode in both modes against float32 on the CPU; FP8 weights stay FP8 in memory."""
    config = {"hidden_size": 256, "num_attention_heads": 4, "head_dim": 128, "moe_intermediate_size": 128}
    if name == "modelslim_static":
        quantize_static(tmp_path, as_bits=True, **config)
    else:
        quantize(tmp_path, *FORMATS[name], **config)
    new_tokens, errors, found = 12, {}, []
    prompts = torch.randint(0, CONFIG["vocab_size"], (3, 40)).tolist()
    exact = LLM(tmp_path, "cpu", dtype="float32")
    for exe_mode in MODES:
        llm = LLM(tmp_path, "cuda", exe_mode=exe_mode, max_new_tokens=new_tokens, batch_size=4, prefix_cache=False)
        assert llm.parameters.formats() == sorted({"dense", *exact_formats(name)})
        sequences, decoded = decode_logits(llm, prompts, new_tokens)
        expected = [exact.logits(sequence)[-new_tokens:-1] for sequence in sequences]
        errors[exe_mode] = relative_error(torch.cat(decoded), torch.cat(expected))
        errors[f"{exe_mode} prefill"] = relative_error(llm.logits(sequences[0]).cpu(), exact.logits(sequences[0]))
        found.append(sequences)
    print(f"\n{name}: relative errors {errors}")
    # bfloat16 activations round to other whole numbers than float32 ones: of the size of the rounding itself
    assert max(errors.values()) < (0.1 if name in ("w8a8", "modelslim_static") else 0.05)
    assert found[0] == found[1]


def exact_formats(name: str) -> list[str]:
    return {"awq": ["w4a16"], "modelslim_static": ["w8a8", "w8a8-static"]}.get(name, [name])
