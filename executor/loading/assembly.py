# SPDX-License-Identifier: Apache-2.0
"""Builds the engine from settings, in four stages, each of which takes only what the one before returned.

`gather_facts` checks the settings against checkpoint and device; `make_plan` decides what follows from them; `load`
joins the process groups, loads the weights and allocates the cache; `assemble` builds model, runner and engine.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3MoeConfig

from executor.config import Settings, resolve_path
from executor.engine.block_pool import BlockPool
from executor.engine.engine import Engine
from executor.engine.graph_runner import GraphRunner
from executor.engine.model_runner import ModelRunner
from executor.engine.scheduler import Scheduler
from executor.loading.before_loading import check_before_launch, default_sampling
from executor.loading.device import free_memory_bytes, select_device, synchronize
from executor.loading.exchanges import plan_dispatch, select_exchanges
from executor.loading.memory import allocate_cache, fill_parameters
from executor.loading.prompts import which
from executor.loading.tokenizer import Tokenizer, has_tokenizer
from executor.sampling_params import SamplingParams
from models.layers.attention import KVCache
from models.layers.expert_exchange import ExpertExchange
from models.layers.parameter import Parameters
from models.layers.rotary import RotaryEmbedding
from models.qwen3_moe.architecture import attention_limit
from models.qwen3_moe.model import Building, Qwen3Moe
from ops import Ops, load_ops
from ops.comm import ParallelContext, init_parallel, local_rank, rank_and_world_size
from ops.recorder import GraphRecorder
from ops.step import BLOCK_SIZE

logger = logging.getLogger(__name__)

DEMO_PATH = "models/qwen3_moe/demo"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Settings with what checkpoint and device say; nothing is loaded yet."""

    settings: Settings
    model_path: Path
    config: Qwen3MoeConfig
    device: torch.device
    dtype: torch.dtype
    ops: Ops
    tokenizer: Tokenizer
    default_sampling: SamplingParams
    known_prompts: list[tuple[str, list[int]]]  # text and tokens of all that will run; empty: not known
    max_len: int  # maximum tokens of a sequence


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Decisions that need no other rank."""

    facts: Facts
    dispatch: Any  # fused dispatch and combine of the backend, or None
    recorder: GraphRecorder | None  # of decode steps; None: eager
    max_sequences: int  # running in each attention DP group
    prefix_cache: bool
    fills_memory: bool  # whether the cache takes all of cache_memory_fraction


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """Process groups, weights and cache."""

    plan: Plan
    parallel: ParallelContext
    parameters: Parameters
    num_blocks: int
    kv_caches: list[KVCache]


@dataclass(frozen=True, kw_only=True)
class Assembled:
    """The engine and its parts."""

    loaded: Loaded
    exchanges: dict[bool, ExpertExchange]  # False: of decode steps, True: of all others
    model: Qwen3Moe
    runner: ModelRunner
    engine: Engine


def build_engine(settings: Settings, prompts: Sequence[str] = (), fills_memory: bool = False) -> Assembled:
    """Runs all stages; ValueError naming what is wrong and what would be right.

    prompts: all that will run with the settings' sampling, if known; the cache is then no larger than they can use.
    fills_memory: the cache takes all of cache_memory_fraction.
    """
    started_s = time.perf_counter()
    assembled = assemble(load(make_plan(gather_facts(settings, prompts), fills_memory)))
    facts = assembled.loaded.plan.facts
    synchronize(facts.device)
    logger.info("ready in %.1f s on %s, operations: %s", time.perf_counter() - started_s, facts.device, facts.ops.name)
    return assembled


def gather_facts(settings: Settings, prompts: Sequence[str] = ()) -> Facts:
    """Selects the device and checks settings, checkpoint and prompts; ValueError."""
    started = rank_and_world_size()[1]
    if settings.world_size != started:
        raise ValueError(
            f"world_size: {settings.world_size} in the settings, but the job has {started} processes; "
            "models/qwen3_moe/infer.sh starts them"
        )
    device = select_device(settings.device, local_rank())
    model_path, config = check_before_launch(settings)
    data, dtype = settings.data_config, getattr(torch, settings.model_config.dtype)
    tokenizer = Tokenizer(
        tokenizer_path(settings, model_path), data.input_max_len, data.long_prompt, data.enable_thinking
    )
    sampling = default_sampling(data, model_path)
    known_prompts = [
        (prompt, encode_prompt(tokenizer, settings, prompt, which(index, len(prompts))))
        for index, prompt in enumerate(prompts)
    ]
    max_len = longest_sequence(settings, config)
    table_bytes = 2 * 4 * config.head_dim * max_len  # cos and sin of every position
    if 4 * table_bytes > free_memory_bytes(device):
        raise ValueError(
            f"data_config.input_max_len: {data.input_max_len} and max_new_tokens {data.max_new_tokens} are more "
            f"positions than the memory of {device} can hold"
        )
    ops = load_ops(device.type)
    ops.check_model(dtype, config.head_dim)
    if settings.exe_mode == "graph" and not ops.can_record:
        raise ValueError(f"exe_mode: graph is not possible on device {device.type}, only eager")
    return Facts(
        settings=settings,
        model_path=model_path,
        config=config,
        device=device,
        dtype=dtype,
        ops=ops,
        tokenizer=tokenizer,
        default_sampling=sampling,
        known_prompts=known_prompts,
        max_len=max_len,
    )


def make_plan(facts: Facts, fills_memory: bool = False) -> Plan:
    """Decides what needs no other rank; sets the environment that collectives need. ValueError."""
    settings, rope = facts.settings, facts.config.rope_parameters["rope_type"]
    prefix_cache = settings.engine_config.prefix_cache
    if prefix_cache and rope in ("dynamic", "longrope"):
        logger.info("no prefix cache: keys of rope type %s depend on the length of their prompt", rope)
        prefix_cache = False
    attn_dp_size = settings.world_size // settings.parallel_config.attn_tp_size
    return Plan(
        facts=facts,
        dispatch=plan_dispatch(settings, facts.config, facts.ops),
        recorder=facts.ops.graph_recorder() if settings.exe_mode == "graph" else None,
        max_sequences=-(-settings.data_config.batch_size // attn_dp_size),
        prefix_cache=prefix_cache,
        fills_memory=fills_memory,
    )


def load(plan: Plan) -> Loaded:
    """Joins the process groups, loads this rank's weights and allocates its cache; ValueError if they do not fit."""
    facts, sizes = plan.facts, plan.facts.settings.parallel_config
    parallel = init_parallel(
        facts.device,
        sizes.attn_tp_size,
        sizes.moe_tp_size,
        sizes.embed_tp_size,
        sizes.lmhead_tp_size,
        with_dispatch=plan.dispatch is not None,
    )
    where = (parallel, facts.dtype, facts.device)
    parameters = fill_parameters(facts.settings, facts.config, facts.model_path, *where, facts.ops)
    parameters.prepare(facts.ops, facts.dtype)
    new_tokens = facts.default_sampling.max_new_tokens
    known_lens = [len(token_ids) + new_tokens - 1 for _, token_ids in facts.known_prompts]  # the last is not cached
    num_blocks, kv_caches = allocate_cache(
        facts.settings, facts.config, facts.max_len, *where, facts.ops, known_lens, plan.fills_memory
    )
    return Loaded(plan=plan, parallel=parallel, parameters=parameters, num_blocks=num_blocks, kv_caches=kv_caches)


@torch.inference_mode()
def assemble(loaded: Loaded) -> Assembled:
    """Builds model, runner and engine on loaded weights; captures the graphs."""
    plan, parallel, facts = loaded.plan, loaded.parallel, loaded.plan.facts
    settings, data = facts.settings, facts.settings.data_config
    exchanges = select_exchanges(settings, facts.config, parallel, facts.ops, plan.dispatch, facts.device)
    build = Building(
        config=facts.config,
        ops=facts.ops,
        parallel=parallel,
        prefill_exchange=exchanges[True],
        decode_exchange=exchanges[False],
    )
    longest = min(facts.max_len, loaded.num_blocks * BLOCK_SIZE)
    model = Qwen3Moe(build, loaded.parameters, RotaryEmbedding(facts.config, longest, facts.device))
    sequence_parallel = settings.parallel_config.sequence_parallel and parallel.attn_tp.size > 1
    runner_parts = (model, loaded.kv_caches, parallel, sequence_parallel, facts.device, plan.max_sequences, longest)
    if plan.recorder is None:
        runner = ModelRunner(*runner_parts)
    else:
        runner = GraphRunner(*runner_parts, plan.recorder, data.input_max_len + data.max_new_tokens)
    limits = settings.engine_config
    schedulers = [
        Scheduler(
            BlockPool(loaded.num_blocks),
            plan.max_sequences,
            limits.max_step_tokens,
            limits.chunk_tokens,
            plan.prefix_cache,
        )
        for _ in range(parallel.attn_dp.size)
    ]
    engine = Engine(runner, schedulers, parallel, facts.tokenizer, facts.ops.runs_ahead)
    return Assembled(loaded=loaded, exchanges=exchanges, model=model, runner=runner, engine=engine)


def tokenizer_path(settings: Settings, model_path: Path) -> Path:
    """Folder of the checkpoint's tokenizer; the demo's for random weights without one."""
    if has_tokenizer(model_path) or settings.model_config.with_ckpt:
        return model_path
    logger.warning("%s has no tokenizer: prompts take the demo's, generated text means nothing", model_path)
    return resolve_path(DEMO_PATH)


def encode_prompt(tokenizer: Tokenizer, settings: Settings, prompt: str, name: str) -> list[int]:
    """Encodes a prompt, as a conversation if the settings say so; ValueError. name: the prompt in errors."""
    if settings.data_config.chat_template:
        return tokenizer.encode_chat([{"role": "user", "content": prompt}], name)
    return tokenizer.encode(prompt, name)


def longest_sequence(settings: Settings, config: Qwen3MoeConfig) -> int:
    """Maximum tokens of a sequence: the model's, or the settings' if they are more."""
    data, limit = settings.data_config, attention_limit(config)
    longest = max(config.max_position_embeddings, data.input_max_len + data.max_new_tokens)
    return longest if limit is None else min(longest, limit[0])
