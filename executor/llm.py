# SPDX-License-Identifier: Apache-2.0
"""What programs use: `LLM` loads a checkpoint once and generates texts or logits."""

import dataclasses
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from executor.config import (
    SECTIONS,
    DataSettings,
    Settings,
    load_settings,
    nearest,
    resolve_path,
    settings_from_dict,
)
from executor.device import free_memory_bytes, select_device, synchronize
from executor.engine import Engine
from executor.kv_cache import BLOCK_SIZE, KVCache, block_bytes, blocks_for
from executor.loader import load_parameters, parameter_bytes, random_parameters
from executor.model_runner import ModelRunner
from executor.sampling_params import SamplingParams
from executor.scheduler import Scheduler, Sequence
from executor.tokenizer import Messages, Tokenizer, has_tokenizer, read_generation_config
from models.layers.rotary import RotaryEmbedding
from models.qwen3_moe.architecture import load_config, trained_len
from models.qwen3_moe.model import Qwen3Moe
from models.qwen3_moe.weights import parameter_specs
from ops import load_ops

logger = logging.getLogger(__name__)

DEMO_PATH = "models/qwen3_moe/demo"
Prompt = str | list[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestOutput:
    """One finished request. Times are in milliseconds.

    ttft_ms: from the start of the prompt's prefill to its first token. tpot_ms: mean time of a token after the first,
    None if there is only one. token_intervals_ms: the times tpot_ms is the mean of. finish_reason: "stop" or "length".
    """

    prompt: str
    prompt_token_ids: list[int]
    text: str
    token_ids: list[int]
    finish_reason: str
    ttft_ms: float
    tpot_ms: float | None
    token_intervals_ms: list[float]


class LLM:
    """A loaded model on one device.

    model_path: folder of the checkpoint. settings: any key of the YAML's sections by its own name (input_max_len,
    exe_mode, cache_tokens, ...; docs/configuration.md). Raises ValueError naming what is wrong and what would be right.
    """

    def __init__(self, model_path: str | Path, device: str = "auto", dtype: str = "bfloat16", **settings: Any):
        raw: dict[str, Any] = {"model_name": Path(model_path).name, "model_path": str(model_path), "device": device}
        for key, value in {"dtype": dtype, **settings}.items():
            place(raw, key, value)
        self._load(settings_from_dict(raw, "LLM"))

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> "LLM":
        """An LLM as a YAML file describes it; overrides are "section.key=value" strings."""
        return cls.from_settings(load_settings(path, overrides))

    @classmethod
    def from_settings(cls, settings: Settings) -> "LLM":
        """An LLM for settings already checked."""
        llm = cls.__new__(cls)
        llm._load(settings)
        return llm

    def _load(self, settings: Settings) -> None:
        start_s = time.perf_counter()
        self.settings = settings
        self.device = select_device(settings.device)
        if settings.exe_mode == "graph" and self.device.type != "cuda":
            raise ValueError(f"exe_mode: graph is not possible on device {self.device.type}, only eager")
        model_path = resolve_path(settings.model_path)
        if not model_path.exists():
            raise ValueError(f"model_path: {settings.model_path} does not exist")
        data, model = settings.data_config, settings.model_config
        self.config = load_config(model_path, model.rope_scaling)
        self.tokenizer = Tokenizer(
            self._tokenizer_path(model_path), data.input_max_len, data.long_prompt, data.enable_thinking
        )
        self.default_sampling = default_sampling(data, model_path)
        self.max_len = max(self.config.max_position_embeddings, data.input_max_len + data.max_new_tokens)
        dtype = getattr(torch, model.dtype)
        self.parameters = self._load_parameters(model_path, dtype)
        ops = load_ops(self.device.type)
        rotary = RotaryEmbedding(self.config, self.max_len, self.device)
        self.model = Qwen3Moe(self.config, self.parameters, rotary, ops)
        self.cache = self._build_cache(dtype)
        self.runner = self._build_runner()
        self.engine = Engine(self.runner, Scheduler(self.cache, data.batch_size), self.tokenizer)
        synchronize(self.device)
        logger.info("ready in %.1f s on %s, operations: %s", time.perf_counter() - start_s, self.device, ops.name)

    def _tokenizer_path(self, model_path: Path) -> Path:
        if has_tokenizer(model_path) or self.settings.model_config.with_ckpt:
            return model_path
        logger.warning("%s has no tokenizer: prompts take the demo's, generated text means nothing", model_path)
        return resolve_path(DEMO_PATH)

    def _load_parameters(self, model_path: Path, dtype: torch.dtype):
        specs = parameter_specs(self.config)
        needed, free = parameter_bytes(specs, dtype), free_memory_bytes(self.device)
        logger.info("weights: %.2f GB in %s, free memory: %.2f GB", needed / 1e9, dtype, free / 1e9)
        if needed > free:
            raise ValueError(
                f"model_path: the weights need {needed / 1e9:.1f} GB in {self.settings.model_config.dtype}, "
                f"{self.device} has {free / 1e9:.1f} GB free"
            )
        if self.settings.model_config.with_ckpt:
            return load_parameters(model_path, specs, dtype, self.device)
        return random_parameters(specs, dtype, self.device, std=self.config.initializer_range)

    def _build_cache(self, dtype: torch.dtype) -> KVCache:
        """A cache of `cache_tokens`, else of `cache_memory_fraction` of the free memory."""
        config, data, model = self.config, self.settings.data_config, self.settings.model_config
        bytes_per_block = block_bytes(config.num_hidden_layers, config.num_key_value_heads, config.head_dim, dtype)
        free = free_memory_bytes(self.device)
        if model.cache_tokens is not None:
            num_blocks = blocks_for(model.cache_tokens)
            if (num_blocks + 1) * bytes_per_block > free:
                needed = num_blocks * bytes_per_block
                raise ValueError(
                    f"model_config.cache_tokens: {model.cache_tokens} tokens need {needed / 1e9:.1f} GB, "
                    f"{self.device} has {free / 1e9:.1f} GB free"
                )
        else:
            affordable = int(free * model.cache_memory_fraction) // bytes_per_block - 1
            num_blocks = min(affordable, data.batch_size * blocks_for(self.max_len))
        if num_blocks < 1:
            raise ValueError("model_config.cache_memory_fraction: no memory is left for even one cache block")
        logger.info("cache: %d tokens, %.2f GB", num_blocks * BLOCK_SIZE, num_blocks * bytes_per_block / 1e9)
        return KVCache(
            config.num_hidden_layers, num_blocks, config.num_key_value_heads, config.head_dim, dtype, self.device
        )

    @torch.inference_mode()
    def _build_runner(self) -> ModelRunner:
        if self.settings.exe_mode == "eager":
            return ModelRunner(self.model, self.cache, self.device)
        from executor.graph_runner import GraphRunner

        data = self.settings.data_config
        max_len = data.input_max_len + data.max_new_tokens
        return GraphRunner(self.model, self.cache, self.device, data.batch_size, max_len)

    def generate(
        self, prompts: Prompt | list[Prompt], sampling_params: SamplingParams | None = None
    ) -> list[RequestOutput]:
        """Continues prompts (texts or lists of token ids), in their order."""
        if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
            prompts = [prompts]
        encoded = [
            (prompt, self.tokenizer.encode(prompt)) if isinstance(prompt, str) else ("", list(prompt))
            for prompt in prompts
        ]
        return self._run_in_order(encoded, sampling_params)

    def chat(
        self, messages: Messages | list[Messages], sampling_params: SamplingParams | None = None
    ) -> list[RequestOutput]:
        """Answers one conversation, or several."""
        conversations = [messages] if messages and isinstance(messages[0], dict) else messages
        encoded = [(messages[-1]["content"], self.tokenizer.encode_chat(messages)) for messages in conversations]
        return self._run_in_order(encoded, sampling_params)

    def _run_in_order(
        self, encoded: list[tuple[str, list[int]]], sampling_params: SamplingParams | None
    ) -> list[RequestOutput]:
        outputs = dict(self.stream(self.requests(encoded, sampling_params)))
        return [outputs[index] for index in range(len(encoded))]

    def requests(
        self, encoded: list[tuple[str, list[int]]], sampling_params: SamplingParams | None = None
    ) -> list[Sequence]:
        """Sequences for `stream` from prompts (text, token ids). ValueError for one that can never run."""
        sampling = sampling_params or self.default_sampling
        sequences = [
            Sequence(
                index=index,
                prompt=prompt,
                prompt_token_ids=token_ids,
                sampling=sampling,
                generator=make_generator(sampling, self.device),
            )
            for index, (prompt, token_ids) in enumerate(encoded)
        ]
        for sequence in sequences:
            self._check(sequence)
        return sequences

    @torch.inference_mode()
    def stream(self, sequences: list[Sequence]) -> Iterator[tuple[int, RequestOutput]]:
        """Yields (index, output) as sequences finish."""
        for sequence in self.engine.run(sequences):
            yield sequence.index, self._output(sequence)

    def _check(self, sequence: Sequence) -> None:
        """Token ids the model has, and lengths that rotary table and cache can hold."""
        token_ids, new_tokens = sequence.prompt_token_ids, sequence.sampling.max_new_tokens
        if not token_ids or min(token_ids) < 0 or max(token_ids) >= self.config.vocab_size:
            raise ValueError(f"token ids must be at least one, each from 0 to {self.config.vocab_size - 1}")
        lengths = f"a prompt of {len(token_ids)} tokens and {new_tokens} new ones"
        if sequence.max_len > self.max_len:
            raise ValueError(
                f"{lengths} is more than {self.max_len}: raise data_config.input_max_len or data_config.max_new_tokens"
            )
        if blocks_for(sequence.max_len) > self.cache.num_blocks:
            raise ValueError(
                f"{lengths} needs more than the cache's {self.cache.num_blocks * BLOCK_SIZE} tokens: shorten it, or "
                "raise model_config.cache_tokens or model_config.cache_memory_fraction"
            )
        if sequence.max_len > trained_len(self.config):
            logger.warning("%s go beyond the %d positions of the checkpoint", lengths, trained_len(self.config))

    def _output(self, sequence: Sequence) -> RequestOutput:
        text = self.tokenizer.decode(sequence.token_ids)
        ends = [text.find(stop) for stop in sequence.sampling.stop if stop in text]
        times_s = sequence.token_times_s
        intervals_ms = [(after - before) * 1e3 for before, after in zip(times_s, times_s[1:], strict=False)]
        return RequestOutput(
            prompt=sequence.prompt,
            prompt_token_ids=sequence.prompt_token_ids,
            text=text[: min(ends)] if ends else text,
            token_ids=sequence.token_ids,
            finish_reason=sequence.finish_reason,
            ttft_ms=(times_s[0] - sequence.started_s) * 1e3,
            tpot_ms=sum(intervals_ms) / len(intervals_ms) if intervals_ms else None,
            token_intervals_ms=intervals_ms,
        )

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """Logits [T, V] float32 after every token of one sequence, on the CPU."""
        [sequence] = self.requests([("", list(token_ids))], SamplingParams(max_new_tokens=1))
        sequence.blocks = self.cache.allocate(len(sequence))
        try:
            return self.runner.prefill([sequence], all_positions=True).cpu()
        finally:
            self.cache.free(sequence.blocks)


def place(raw: dict[str, Any], key: str, value: Any) -> None:
    """Puts a setting given by its bare name where it belongs in the tree of settings."""
    if key in {definition.name for definition in dataclasses.fields(Settings)} and key not in SECTIONS:
        raw[key] = value
        return
    for section, kind in SECTIONS.items():
        if key in {definition.name for definition in dataclasses.fields(kind)}:
            raw.setdefault(section, {})[key] = value
            return
    raise ValueError(f"LLM: {key}: unknown setting{nearest(key, '')}")


def default_sampling(data: DataSettings, model_path: Path) -> SamplingParams:
    """Sampling as the settings say, or as the checkpoint's generation_config.json does if they say so."""
    keys = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    stated = {key: getattr(data, key) for key in keys}
    if data.sampling_from_checkpoint:
        defaults = DataSettings()
        both = [key for key in keys if stated[key] != getattr(defaults, key)]
        if both:
            raise ValueError(f"data_config.{both[0]}: cannot be set beside data_config.sampling_from_checkpoint: True")
        generation = read_generation_config(model_path)
        stated |= {key: generation[key] for key in keys if generation.get(key) is not None}
        if not generation.get("do_sample", False):
            stated["temperature"] = 0.0
        elif "temperature" not in generation:
            stated["temperature"] = 1.0
    try:
        return SamplingParams(
            max_new_tokens=data.max_new_tokens,
            seed=data.seed,
            stop=tuple(data.stop),
            ignore_eos=data.ignore_eos,
            **stated,
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"data_config.{error}") from None


def make_generator(sampling: SamplingParams, device: torch.device) -> torch.Generator | None:
    """Every request has its own random numbers, so that its text does not depend on its neighbours."""
    if sampling.greedy:
        return None
    generator = torch.Generator(device)
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    return generator
