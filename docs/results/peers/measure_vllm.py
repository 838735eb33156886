# SPDX-License-Identifier: Apache-2.0
"""Measures ttft and tpot of vLLM at the shape of Qwen3-30B-A3B with random weights; `bench plot` reads what it writes.

Needs vLLM and an NVIDIA GPU, and nothing of this repository but the shape's config.json. Requests are greedy, prompts
distinct random tokens. vLLM reports no time of a single token here, so tpot is a mean: the wall time of `--new-tokens`
tokens less that of one token, over the tokens between; wall times are medians of `--repeats` runs.
"""

import argparse
import json
import os
import random
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

SHAPE = Path(__file__).resolve().parents[3] / "models" / "qwen3_moe" / "shapes" / "qwen3_30b_a3b" / "config.json"
LONGEST = 262144  # positions, so that the configuration allows every length of --prompt-tokens
AWQ = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 128,
    "zero_point": True,
    "version": "gemm",
    "modules_to_not_convert": ["mlp.gate", "lm_head"],
}


def main() -> None:
    arguments = parse()
    # The engine runs in this process, and torch samples: nothing but the model's step is between two tokens.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    import vllm

    started_s = time.perf_counter()
    llm = build(arguments)
    report = {
        "model_name": "qwen3_30b",
        "device": torch.cuda.get_device_name(),
        "versions": {"vllm": vllm.__version__, "torch": torch.__version__},
        "start_s": round(time.perf_counter() - started_s, 1),
        "settings": {name: value for name, value in vars(arguments).items() if name != "output"},
        "results": [],
    }
    for prompt_tokens in arguments.prompt_tokens:
        for batch_size in arguments.batch_size:
            report["results"].append(measure(llm, arguments, batch_size, prompt_tokens, vllm.__version__))
            print(json.dumps(report["results"][-1]), flush=True)
            Path(arguments.output).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True, metavar="FILE", help="JSON file")
    parser.add_argument("--mode", choices=["graph", "eager"], default="graph")
    parser.add_argument("--quantization", choices=["awq"], help="4 bits in groups of 128, float16 activations")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1], help="at most 8")
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[64])
    parser.add_argument("--new-tokens", type=int, default=129, help="at least 2")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-model-len", type=int, default=8192)
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    arguments = parser.parse_args()
    if arguments.new_tokens < 2 or not all(1 <= size <= 8 for size in arguments.batch_size):
        parser.error("--new-tokens is at least 2, --batch-size 1 to 8")
    return arguments


def build(arguments: argparse.Namespace) -> Any:
    """vLLM's engine on a folder that holds the shape's config.json only."""
    from vllm import LLM

    config = json.loads(SHAPE.read_text(encoding="utf-8")) | {"max_position_embeddings": LONGEST}
    if arguments.quantization:
        config["quantization_config"] = AWQ
    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    is_graph = arguments.mode == "graph"
    return LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype="float16" if arguments.quantization else "bfloat16",
        max_model_len=arguments.max_model_len,
        max_num_seqs=8,
        max_num_batched_tokens=arguments.max_num_batched_tokens,
        gpu_memory_utilization=0.93,
        enable_prefix_caching=False,
        enforce_eager=not is_graph,
        compilation_config={"cudagraph_capture_sizes": [1, 2, 4, 8]} if is_graph else None,
    )


def measure(
    llm: Any, arguments: argparse.Namespace, batch_size: int, prompt_tokens: int, version: str
) -> dict[str, Any]:
    """One row of the report, after a warm-up."""
    new_tokens = arguments.new_tokens
    wall_s(llm, batch_size, prompt_tokens, 8)
    first_s = median(wall_s(llm, batch_size, prompt_tokens, 1) for _ in range(arguments.repeats))
    all_s = median(wall_s(llm, batch_size, prompt_tokens, new_tokens) for _ in range(arguments.repeats))
    return {
        "system": f"vLLM {version}",
        "exe_mode": arguments.mode,
        "dtype": "float16" if arguments.quantization else "bfloat16",
        "quantization": arguments.quantization,
        "world_size": 1,
        "batch_size": batch_size,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "ttft_ms": {"p50": round(first_s * 1e3, 2)},
        "tpot_ms": {"mean": round((all_s - first_s) / (new_tokens - 1) * 1e3, 4)},
    }


def wall_s(llm: Any, batch_size: int, prompt_tokens: int, new_tokens: int) -> float:
    """Seconds that one batch takes."""
    from vllm import SamplingParams

    prompts = [
        {"prompt_token_ids": [random.randrange(1000, 150000) for _ in range(prompt_tokens)]} for _ in range(batch_size)
    ]
    sampling = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    start_s = time.perf_counter()
    llm.generate(prompts, sampling, use_tqdm=False)
    return time.perf_counter() - start_s


if __name__ == "__main__":
    main()
