# SPDX-License-Identifier: Apache-2.0
"""What the commands share: their common options, starting ranks, building the model, random prompts.

Commands import torch only after `start_ranks`: the process that starts ranks sets what torch logs when it is imported.
"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from executor.config import REPOSITORY, Settings, load_settings, resolve_path
from executor.launch import launch
from executor.utils.arguments import ArgumentParser
from executor.utils.files import check_output, files_in

if TYPE_CHECKING:
    from executor.llm import LLM, RequestOutput

CONFIG_FOLDER = REPOSITORY / "models" / "qwen3_moe" / "config"


def command_parser(command: str, description: str) -> argparse.ArgumentParser:
    """A parser with the options that every command has which runs a model."""
    parser = ArgumentParser(prog=f"python -m executor.bench {command}", description=description)
    parser.add_argument("--yaml", required=True, help="settings: a file, or a name in models/qwen3_moe/config/")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    parser.add_argument("--allow-fallback", action="store_true", help="measure even where an operation is plain torch")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write the report there as JSON, anew with each result"
    )
    return parser


def positive(text: str) -> int:
    """A number of something there has to be one of."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, at least 1")
    return int(text)


def settings_of(arguments: argparse.Namespace, *overrides: str) -> Settings:
    """What `--yaml` and `--set` say, and `overrides` over them."""
    yaml_file = Path(arguments.yaml)
    if not yaml_file.is_file():
        yaml_file = CONFIG_FOLDER / yaml_file.with_suffix(".yaml")
    settings = load_settings(yaml_file, [*arguments.set, *overrides])
    if settings.model_config.enable_profiler:
        raise ValueError("model_config.enable_profiler: what is traced is not measured; set it to False")
    if arguments.output and os.environ.get("RANK", "0") == "0":
        check_output("--output", arguments.output, [yaml_file, *files_in(resolve_path(settings.model_path))])
    return settings


def start_ranks(settings: Settings) -> None:
    """Ends this process with its ranks' exit code if the settings want several; returns in each of them."""
    if settings.world_size > 1 and "WORLD_SIZE" not in os.environ:
        launch(settings, ["executor.bench", *sys.argv[1:]])


def build_llm(settings: Settings, sizes: list[tuple[int, int]], batch_size: int, allow_fallback: bool) -> "LLM":
    """The model, large enough for batches of every size (tokens of a prompt, new tokens) that is to be measured.

    ValueError if the cache is not, as fewer sequences would run at once than the row says, and, before anything is
    loaded, if an accelerator lacks operations of its own and that is not allowed.
    """
    from executor.kv_cache import BLOCK_SIZE, blocks_for
    from executor.llm import LLM

    if not allow_fallback:
        refuse_fallbacks(settings)
    longest = max(prompt_tokens for prompt_tokens, _ in sizes)
    tokens = max(map(sum, sizes))
    data = dataclasses.replace(
        settings.data_config, input_max_len=longest, max_new_tokens=tokens - longest, batch_size=batch_size
    )
    llm = LLM.from_settings(dataclasses.replace(settings, data_config=data))
    needed = llm.engine.schedulers[0].batch_size * blocks_for(tokens - 1)  # the last token is not cached
    if needed > llm.num_blocks:
        raise ValueError(
            f"--batch-size: {batch_size} sequences of {tokens} tokens need a cache of {needed * BLOCK_SIZE} tokens, "
            f"there are {llm.num_blocks * BLOCK_SIZE}: measure less, or raise model_config.cache_tokens (if it is not "
            "set, model_config.cache_memory_fraction)"
        )
    return llm


def refuse_fallbacks(settings: Settings) -> None:
    import torch

    from executor.device import select_device
    from ops import load_ops
    from ops.comm import local_rank

    device = select_device(settings.device, local_rank())
    lacking = load_ops(device.type).fallbacks(getattr(torch, settings.model_config.dtype))
    if lacking:
        raise ValueError(
            f"device: {device.type} has no operation of its own, or not the best one, for {', '.join(lacking)} with "
            f"dtype {settings.model_config.dtype} (docs/gpu.md and docs/npu.md say what is needed); --allow-fallback "
            "measures all the same"
        )


def check_finished(outputs: "list[RequestOutput]") -> None:
    """RuntimeError if a measured prompt failed: its times are none of a whole text."""
    errors = [output.error for output in outputs if output.error is not None]
    if errors:
        raise RuntimeError(f"{len(errors)} of {len(outputs)} measured prompts failed: {errors[0]}")


def random_prompts(llm: "LLM", batch_size: int, prompt_tokens: int) -> list[list[int]]:
    """Distinct prompts, so that sequences choose different experts; the same in every run."""
    import torch

    generator = torch.Generator().manual_seed(batch_size * 100003 + prompt_tokens)
    return torch.randint(0, llm.config.vocab_size, (batch_size, prompt_tokens), generator=generator).tolist()


def describe_device(llm: "LLM") -> dict[str, Any]:
    """What a report says of what ran, and where."""
    from executor.device import device_name

    return {
        "model_name": llm.settings.model_name,
        "device": device_name(llm.device),
        "ops": llm.ops.name,
        "fallbacks": [] if llm.device.type == "cpu" else llm.ops.fallbacks(llm.dtype),
    }
