# SPDX-License-Identifier: Apache-2.0
"""Shared helpers of the benchmark commands: common options, starting ranks, building the model, random prompts.

Commands import torch only after `start_ranks`: the launcher sets torch's log level, which is read at import.
"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from executor.config import CONFIG_FOLDER, Settings, load_settings, resolve_path
from executor.launch.launcher import launch
from executor.utils.arguments import ArgumentParser
from executor.utils.files import check_output, files_in

if TYPE_CHECKING:
    from executor.llm import LLM, RequestOutput


def command_parser(command: str, description: str) -> argparse.ArgumentParser:
    """Argument parser with the options common to all commands that run a model."""
    parser = ArgumentParser(prog=f"python -m executor.bench {command}", description=description)
    parser.add_argument("--yaml", required=True, help="settings: a file, or a name in models/qwen3_moe/config/")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    parser.add_argument("--allow-fallback", action="store_true", help="measure operations in plain torch, too")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write the report there as JSON, updated after each result"
    )
    return parser


def settings_of(arguments: argparse.Namespace, *overrides: str) -> Settings:
    """Settings of `--yaml` and `--set`, with `overrides` applied last."""
    yaml_file = Path(arguments.yaml)
    if not yaml_file.is_file():
        yaml_file = CONFIG_FOLDER / yaml_file.with_suffix(".yaml")
    settings = load_settings(yaml_file, [*arguments.set, *overrides])
    if settings.model_config.enable_profiler:
        raise ValueError("model_config.enable_profiler: profiling distorts measurements; set it to False")
    if arguments.output and os.environ.get("RANK", "0") == "0":
        check_output("--output", arguments.output, [yaml_file, *files_in(resolve_path(settings.model_path))])
    return settings


def start_ranks(settings: Settings) -> None:
    """Launches the ranks if world_size > 1 and exits with their exit code; returns in each rank."""
    if settings.world_size > 1 and "WORLD_SIZE" not in os.environ:
        launch(settings, ["executor.bench", *sys.argv[1:]])


def build_llm(
    settings: Settings,
    sizes: list[tuple[int, int]],
    batch_size: int,
    allow_fallback: bool,
    prefix_cache: bool = False,
) -> "LLM":
    """Builds the model for batches of the given sizes (prompt tokens, new tokens); without prefix cache, as prompts
    are repeated, unless that is what is measured.

    ValueError if the cache cannot hold the batch (fewer sequences than reported would run at a time), and, before
    loading, if operations would fall back to plain torch without `allow_fallback`.
    """
    from executor.llm import LLM
    from ops.step import BLOCK_SIZE, blocks_for

    if not allow_fallback:
        refuse_fallbacks(settings)
    longest = max(prompt_tokens for prompt_tokens, _ in sizes)
    tokens = max(map(sum, sizes))
    data = dataclasses.replace(
        settings.data_config, input_max_len=longest, max_new_tokens=tokens - longest, batch_size=batch_size
    )
    engine = dataclasses.replace(settings.engine_config, prefix_cache=prefix_cache)
    llm = LLM.from_settings(dataclasses.replace(settings, data_config=data, engine_config=engine))
    needed = llm.engine.schedulers[0].max_sequences * blocks_for(tokens - 1)  # the last token is never cached
    if needed > llm.num_blocks:
        raise ValueError(
            f"--batch-size: {batch_size} sequences of {tokens} tokens need a cache of {needed * BLOCK_SIZE} tokens, "
            f"there are {llm.num_blocks * BLOCK_SIZE}: measure less, or raise model_config.cache_tokens (if it is not "
            "set, model_config.cache_memory_fraction)"
        )
    return llm


def refuse_fallbacks(settings: Settings) -> None:
    import torch

    from executor.loading.device import select_device
    from ops import load_ops
    from ops.comm import local_rank

    device = select_device(settings.device, local_rank())
    lacking = load_ops(device.type).fallbacks(getattr(torch, settings.model_config.dtype))
    if lacking:
        raise ValueError(
            f"device: {device.type} has no operation of its own, or not the best one, for {', '.join(lacking)} with "
            f"dtype {settings.model_config.dtype} (docs/gpu.md and docs/npu.md say what is needed); --allow-fallback "
            "measures anyway"
        )


def check_finished(outputs: "list[RequestOutput]") -> None:
    """Raises RuntimeError if a measured prompt failed: its times are not valid."""
    errors = [output.error for output in outputs if output.error is not None]
    if errors:
        raise RuntimeError(f"{len(errors)} of {len(outputs)} measured prompts failed: {errors[0]}")


def known(figure: float | None) -> float:
    """Asserts that a measured value is not None, and returns it."""
    assert figure is not None
    return figure


def random_prompts(llm: "LLM", batch_size: int, prompt_tokens: int) -> list[list[int]]:
    """Distinct random prompts (fixed seed), so that sequences are routed to different experts."""
    import torch

    generator = torch.Generator().manual_seed(batch_size * 100003 + prompt_tokens)
    return torch.randint(0, llm.config.vocab_size, (batch_size, prompt_tokens), generator=generator).tolist()


def describe_device(llm: "LLM") -> dict[str, Any]:
    """Report entries for model, device, backend and fallbacks."""
    from executor.loading.device import device_name

    return {
        "model_name": llm.settings.model_name,
        "device": device_name(llm.device),
        "ops": llm.ops.name,
        "formats": llm.parameters.formats(),
        "fallbacks": [] if llm.device.type == "cpu" else llm.ops.fallbacks(llm.dtype, llm.parameters.formats()),
    }
