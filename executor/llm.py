# SPDX-License-Identifier: Apache-2.0
"""What programs use: `LLM` loads a checkpoint once and generates texts or logits."""

import dataclasses
import logging
import time
from bisect import bisect_left
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch

from executor.config import Settings, load_settings, resolve_path, settings_from_dict
from executor.engine.engine import Engine
from executor.engine.graph_runner import GraphRunner
from executor.engine.kv_cache import BLOCK_SIZE, BlockAllocator, blocks_for
from executor.engine.model_runner import ModelRunner
from executor.engine.sampler import make_generator
from executor.engine.scheduler import Scheduler, Sequence
from executor.loading.before_loading import check_before_launch, default_sampling, folder_name, store_setting
from executor.loading.device import free_memory_bytes, select_device, synchronize
from executor.loading.exchanges import plan_dispatch, select_exchanges
from executor.loading.memory import allocate_cache, fill_parameters
from executor.loading.prompts import Messages, Prompt, conversation_list, prompt_list, token_id_list, which
from executor.loading.tokenizer import Tokenizer, has_tokenizer
from executor.sampling_params import SamplingParams
from models.layers.expert_exchange import ExpertExchange
from models.layers.rotary import RotaryEmbedding
from models.qwen3_moe.architecture import attention_limit, trained_len
from models.qwen3_moe.model import Building, Qwen3Moe
from ops import load_ops
from ops.comm import init_parallel, local_rank, rank_and_world_size
from ops.recorder import GraphRecorder

logger = logging.getLogger(__name__)

DEMO_PATH = "models/qwen3_moe/demo"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestOutput:
    """One finished request. Times are in milliseconds.

    ttft_ms: from the start of the prompt's prefill to its first token. tpot_ms: mean time of a token after the first,
    None if there is only one. token_intervals_ms: the times tpot_ms is the mean of.
    finish_reason: "stop", "length", or "error" for a prompt whose logits were not finite: `error` then says at which
    token and what the likely cause is, the tokens before it are kept, and ttft_ms is None if there is none.
    """

    prompt: str
    prompt_token_ids: list[int]
    text: str
    token_ids: list[int]
    finish_reason: str
    error: str | None = None
    ttft_ms: float | None
    tpot_ms: float | None
    token_intervals_ms: list[float]


class LLM:
    """A loaded model, or this rank's part of it.

    model_path: folder of the checkpoint. settings: any key of the YAML's sections by its own name (input_max_len,
    exe_mode, cache_tokens, ...; docs/configuration.md). Raises ValueError naming what is wrong and what would be right.
    """

    def __init__(self, model_path: str | Path, device: str = "auto", dtype: str = "bfloat16", **settings: Any):
        raw = {"model_name": folder_name(model_path), "model_path": str(model_path), "device": device}
        for key, value in {"dtype": dtype, **settings}.items():
            store_setting(raw, key, value)
        self._load(settings_from_dict(raw, "LLM"))

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> "LLM":
        """An LLM as a YAML file describes it; overrides are "section.key=value" strings."""
        return cls.from_settings(load_settings(path, overrides))

    @classmethod
    def from_settings(cls, settings: Settings, prompts: list[str] | None = None) -> "LLM":
        """An LLM for settings already checked.

        prompts: all that it is to run with the settings' own sampling, if that is known. Their tokens are then in
        `known_prompts`, and the cache is no larger than what they can use.
        """
        llm = cls.__new__(cls)
        llm._load(settings, prompts or ())
        return llm

    def _load(self, settings: Settings, prompts: Collection[str] = ()) -> None:
        start_s = time.perf_counter()
        self.settings = settings
        data, model, sizes = settings.data_config, settings.model_config, settings.parallel_config
        started = rank_and_world_size()[1]
        if settings.world_size != started:
            raise ValueError(
                f"world_size: {settings.world_size} in the settings, but the job has {started} processes; "
                "models/qwen3_moe/infer.sh starts them"
            )
        self.device = select_device(settings.device, local_rank())
        model_path, self.config = check_before_launch(settings)
        self.tokenizer = Tokenizer(
            self._tokenizer_path(model_path), data.input_max_len, data.long_prompt, data.enable_thinking
        )
        self.default_sampling = default_sampling(data, model_path)
        self.known_prompts = [
            (prompt, self.encode_prompt(prompt, which(index, len(prompts)))) for index, prompt in enumerate(prompts)
        ]
        self.max_len = max(self.config.max_position_embeddings, data.input_max_len + data.max_new_tokens)
        limit = attention_limit(self.config)
        if limit is not None:
            self.max_len = min(self.max_len, limit[0])
        table_bytes = 2 * 4 * self.config.head_dim * self.max_len  # cos and sin of every position
        if 4 * table_bytes > free_memory_bytes(self.device):
            raise ValueError(
                f"data_config.input_max_len: {data.input_max_len} and max_new_tokens {data.max_new_tokens} are more "
                f"positions than the memory of {self.device} can hold"
            )
        self.dtype = getattr(torch, model.dtype)
        self.ops = load_ops(self.device.type)
        self.ops.check_model(self.dtype, self.config.head_dim)
        if settings.exe_mode == "graph" and not self.ops.can_record:
            raise ValueError(f"exe_mode: graph is not possible on device {self.device.type}, only eager")
        recorder = self.ops.graph_recorder() if settings.exe_mode == "graph" else None
        self.dispatch_plan = plan_dispatch(settings, self.config, self.ops)
        self.parallel = init_parallel(
            self.device,
            sizes.attn_tp_size,
            sizes.moe_tp_size,
            sizes.embed_tp_size,
            sizes.lmhead_tp_size,
            with_dispatch=self.dispatch_plan is not None,
        )
        where = (self.parallel, self.dtype, self.device)
        self.parameters = fill_parameters(settings, self.config, model_path, *where)
        self.parameters.prepare(self.ops)
        new_tokens = self.default_sampling.max_new_tokens
        known_lens = [len(token_ids) + new_tokens - 1 for _, token_ids in self.known_prompts]  # the last is not cached
        self.num_blocks, self.kv_caches = allocate_cache(settings, self.config, self.max_len, *where, known_lens)
        self.model = self._build_model()
        self.runner = self._build_runner(recorder)
        dp_size = self.parallel.attn_dp.size
        schedulers = [
            Scheduler(BlockAllocator(self.num_blocks), batch_size=-(-data.batch_size // dp_size))
            for _ in range(dp_size)
        ]
        self.engine = Engine(self.runner, schedulers, self.parallel, self.tokenizer)
        synchronize(self.device)
        logger.info("ready in %.1f s on %s, operations: %s", time.perf_counter() - start_s, self.device, self.ops.name)

    def _tokenizer_path(self, model_path: Path) -> Path:
        if has_tokenizer(model_path) or self.settings.model_config.with_ckpt:
            return model_path
        logger.warning("%s has no tokenizer: prompts take the demo's, generated text means nothing", model_path)
        return resolve_path(DEMO_PATH)

    def _build_model(self) -> Qwen3Moe:
        settings = self.settings
        self.exchanges = select_exchanges(
            settings, self.config, self.parallel, self.ops, self.dispatch_plan, self.device
        )
        build = Building(
            config=self.config,
            ops=self.ops,
            parallel=self.parallel,
            prefill_exchange=self.exchanges[True],
            decode_exchange=self.exchanges[False],
            prefetch=settings.model_config.npu_prefetch,
            fused_o_proj=settings.parallel_config.npu_mm_all_reduce_base,
        )
        longest = min(self.max_len, self.num_blocks * BLOCK_SIZE)
        return Qwen3Moe(build, self.parameters, RotaryEmbedding(self.config, longest, self.device))

    def encode_prompt(self, prompt: str, name: str = "the prompt") -> list[int]:
        """Tokens of a prompt, as a conversation if the settings say so. ValueError for one that cannot be encoded.

        name: of the prompt, for errors and warnings.
        """
        if self.settings.data_config.chat_template:
            return self.tokenizer.encode_chat([{"role": "user", "content": prompt}], name)
        return self.tokenizer.encode(prompt, name)

    def exchange(self, is_prefill: bool) -> ExpertExchange:
        """How tokens reach their experts in a prefill or a decode step."""
        return self.exchanges[is_prefill]

    @torch.inference_mode()
    def _build_runner(self, recorder: GraphRecorder | None) -> ModelRunner:
        parallel, data = self.parallel, self.settings.data_config
        sequence_parallel = self.settings.parallel_config.sequence_parallel and parallel.attn_tp.size > 1
        if recorder is None:
            return ModelRunner(self.model, self.kv_caches, parallel, sequence_parallel, self.device)
        return GraphRunner(
            self.model,
            self.kv_caches,
            parallel,
            sequence_parallel,
            self.device,
            recorder,
            batch_size=-(-data.batch_size // parallel.attn_dp.size),
            max_len=data.input_max_len + data.max_new_tokens,
        )

    def generate(
        self, prompts: Prompt | list[Prompt], sampling_params: SamplingParams | None = None
    ) -> list[RequestOutput]:
        """Continues a prompt or several, in their order.

        prompts: a text, the token ids of one prompt (a list, tuple or range of whole numbers, an integer array or
        tensor), or a list of those; the rows of a 2-D array or tensor are prompts too. sampling_params: for all of
        them, in place of the LLM's defaults as a whole (None takes those).

        Raises TypeError for anything else, ValueError, before any prompt runs, for one that can never run.
        """
        given = prompt_list(prompts)
        encoded = [
            (prompt, self.tokenizer.encode(prompt, which(index, len(given))))
            if isinstance(prompt, str)
            else ("", prompt)
            for index, prompt in enumerate(given)
        ]
        return self._run_in_order(encoded, sampling_params)

    def chat(
        self, messages: Messages | list[Messages], sampling_params: SamplingParams | None = None
    ) -> list[RequestOutput]:
        """Answers one conversation, or several.

        messages: a list of messages {"role": ..., "content": text}, or a list of such lists; further keys of a
        message reach the chat template as they are. sampling_params: for all of them, in place of the LLM's defaults
        as a whole (None takes those). Raises TypeError and ValueError as `generate` does.
        """
        given = conversation_list(messages)
        encoded = [
            (conversation[-1]["content"], self.tokenizer.encode_chat(conversation, which(index, len(given))))
            for index, conversation in enumerate(given)
        ]
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
        sampling = self.default_sampling if sampling_params is None else sampling_params
        if not isinstance(sampling, SamplingParams):
            raise TypeError(
                f"sampling_params: expected one SamplingParams for all prompts, got a {type(sampling).__name__}"
            )
        if sampling.stop and not self.tokenizer.can_decode:
            raise ValueError("stop: this checkpoint has no tokenizer, so that no text can be searched for it")
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
            self._check(sequence, which(sequence.index, len(sequences)))
        return sequences

    @torch.inference_mode()
    def stream(self, sequences: list[Sequence]) -> Iterator[tuple[int, RequestOutput]]:
        """Yields (index, output) as sequences finish."""
        for sequence in self.engine.run(sequences):
            yield sequence.index, self._output(sequence)

    def _check(self, sequence: Sequence, name: str) -> None:
        """Token ids the model has, and lengths that rotary table and cache can hold."""
        token_ids, new_tokens = sequence.prompt_token_ids, sequence.sampling.max_new_tokens
        whole_numbers = all(type(token_id) is int for token_id in token_ids)
        if not token_ids or not whole_numbers or min(token_ids) < 0 or max(token_ids) >= self.config.vocab_size:
            raise ValueError(f"{name}: token ids must be at least one, each from 0 to {self.config.vocab_size - 1}")
        lengths = f"{name} of {len(token_ids)} tokens and {new_tokens} new ones"
        if sequence.max_len > self.max_len:
            limit = attention_limit(self.config)
            remedy = "raise data_config.input_max_len or data_config.max_new_tokens"
            if limit is not None and limit[0] == self.max_len:
                remedy = f"config.json's {limit[1]} is not supported beyond it"
            raise ValueError(f"{lengths} is more than {self.max_len}: {remedy}")
        if blocks_for(sequence.max_len) > self.num_blocks:
            raise ValueError(
                f"{lengths} needs more than the cache's {self.num_blocks * BLOCK_SIZE} tokens: shorten it, or "
                "raise model_config.cache_tokens or model_config.cache_memory_fraction"
            )
        if sequence.max_len > trained_len(self.config):
            logger.warning("%s go beyond the %d positions of the checkpoint", lengths, trained_len(self.config))

    def _output(self, sequence: Sequence) -> RequestOutput:
        assert sequence.finish_reason is not None, "it has not finished"
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
            error=self._not_finite(f"new token {len(times_s) + 1}") if sequence.finish_reason == "error" else None,
            ttft_ms=(times_s[0] - sequence.started_s) * 1e3 if times_s else None,
            tpot_ms=sum(intervals_ms) / len(intervals_ms) if intervals_ms else None,
            token_intervals_ms=intervals_ms,
        )

    def _not_finite(self, where: str) -> str:
        """Says that the logits of `where` are not finite, and why that is likely so."""
        cause = (
            "a number was probably too large for dtype float16; try bfloat16, which has the range of float32"
            if self.dtype is torch.float16
            else "the checkpoint's weights are probably damaged or do not fit its config.json"
        )
        return f"the logits of {where} are not finite (NaN or infinity): {cause}"

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """Logits [T, V] float32 after every token of one sequence, on the CPU; the same on every rank.

        ValueError naming the first position whose logits are not finite.
        """
        token_ids = token_id_list(token_ids)
        logits = self._prefill_logits(token_ids)
        if logits is None:
            # attention may have spread NaN to earlier positions, too: those of a shorter sequence are not touched
            shorter = range(1, len(token_ids))
            first = bisect_left(shorter, True, key=lambda count: self._prefill_logits(token_ids[:count]) is None)
            raise ValueError(self._not_finite(f"position {first}"))
        return logits

    def _prefill_logits(self, token_ids: list[int]) -> torch.Tensor | None:
        """`logits`, None if they are not finite."""
        self.engine.check_idle()
        batches = []
        try:
            for scheduler in self.engine.schedulers:  # every group of attention ranks runs the sequence
                [sequence] = self.requests([("", token_ids)], SamplingParams(max_new_tokens=1))
                scheduler.add(sequence)
                batches.append(scheduler.start_waiting())
            logits = self.runner.prefill(batches, all_positions=True).whole().cpu()
            if not torch.stack(logits.aminmax()).isfinite().all():  # both are NaN if one of the logits is
                return None
            for scheduler, [sequence] in zip(self.engine.schedulers, batches, strict=True):
                scheduler.finish(sequence)
            return logits
        finally:
            self.engine.clear()
