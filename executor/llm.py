# SPDX-License-Identifier: Apache-2.0
"""Python API: `LLM` loads a checkpoint once and generates texts, scores or logits."""

import threading
import uuid
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from executor.config import Settings, load_settings, settings_from_dict
from executor.engine.engine import TokenEvent
from executor.engine.request import Request, not_finite, request_output, stream_chunk
from executor.engine.request_limits import RequestLimits
from executor.engine.sampler import make_random
from executor.engine.sequence import Sequence
from executor.engine.text_stream import TextStream
from executor.loading.assembly import Assembled, build_engine
from executor.loading.before_loading import folder_name, store_setting
from executor.loading.prompts import Messages, Prompt, conversation_list, prompt_list, token_id_list, which
from executor.outputs import RequestOutput, StreamChunk
from executor.sampling_params import SamplingParams
from models.layers.expert_exchange import ExpertExchange

Params = SamplingParams | list[SamplingParams] | None


class LLM:
    """A loaded model, or this rank's part of it.

    model_path: folder of the checkpoint. device: auto, npu, cuda or cpu. dtype: bfloat16, float16 or float32.
    settings: keys of the YAML by their own names; docs/configuration.md says what each means:
        exe_mode, world_size, log_level, output_dir, model_name
        with_ckpt, rope_scaling, cache_memory_fraction, cache_tokens, enable_profiler
        input_max_len, long_prompt, chat_template, enable_thinking, batch_size, max_new_tokens
        sampling_from_checkpoint, temperature, top_k, top_p, min_p, repetition_penalty, seed, stop, ignore_eos
        attn_tp_size, moe_tp_size, embed_tp_size, lmhead_tp_size, attn_dp_size, moe_ep_size, sequence_parallel
        max_step_tokens, chunk_tokens, prefix_cache
        dataset, dataset_path, longbench_task, text_field, prompt_template, max_prompts (of infer.sh only)
    Raises ValueError naming what is wrong and what would be right.

    Example:
        llm = LLM("path/of/the/checkpoint", max_new_tokens=64)
        print(llm.generate("A farmer has 17 sheep.")[0].text)
        for chunk in llm.stream("Once upon a time", SamplingParams(temperature=0.8, seed=1)):
            print(chunk.text, end="", flush=True)

    With several ranks (torchrun) every rank makes the same calls with the same arguments and gets the same results.
    """

    def __init__(self, model_path: str | Path, device: str = "auto", dtype: str = "bfloat16", **settings: Any):
        self._adopt(build_engine(settings_of(model_path, device, dtype, settings)))

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> "LLM":
        """Loads what a YAML file describes; overrides are "section.key=value" strings."""
        return cls.from_settings(load_settings(path, overrides))

    @classmethod
    def from_settings(cls, settings: Settings, prompts: list[str] | None = None, fills_memory: bool = False) -> "LLM":
        """Loads what checked settings describe.

        prompts: all that will run with the settings' own sampling, if known. Their tokens are then in `known_prompts`,
        and the cache is no larger than what they can use. fills_memory: the cache takes all of cache_memory_fraction.
        """
        llm = cls.__new__(cls)
        llm._adopt(build_engine(settings, prompts or (), fills_memory))
        return llm

    def _adopt(self, assembled: Assembled) -> None:
        loaded, facts = assembled.loaded, assembled.loaded.plan.facts
        self.settings = facts.settings
        self.config = facts.config
        self.device = facts.device
        self.dtype = facts.dtype
        self.ops = facts.ops
        self.tokenizer = facts.tokenizer
        self.default_sampling = facts.default_sampling
        self.known_prompts = facts.known_prompts
        self.max_len = facts.max_len
        self.parallel = loaded.parallel
        self.parameters = loaded.parameters
        self.num_blocks = loaded.num_blocks
        self.kv_caches = loaded.kv_caches
        self.exchanges = assembled.exchanges
        self.model = assembled.model
        self.runner = assembled.runner
        self.engine = assembled.engine
        self.limits = RequestLimits(
            config=facts.config, tokenizer=facts.tokenizer, max_len=facts.max_len, num_blocks=loaded.num_blocks
        )
        self._lock = threading.RLock()  # a thread at a time adds, cancels and steps
        self._queues: dict[str, deque[TokenEvent]] = {}  # request id -> events that its client has not taken

    def generate(
        self, prompts: Prompt | list[Prompt], sampling_params: Params = None, use_tqdm: bool = True
    ) -> list[RequestOutput]:
        """Completes one prompt or several; returns their outputs in order.

        prompts: a text, the token ids of one prompt (a list, tuple or range of whole numbers, an integer array or
        tensor), or a list of those; the rows of a 2-D array or tensor are prompts too. sampling_params: one for all
        prompts or a list with one for each, in place of the LLM's defaults as a whole (None takes those). use_tqdm:
        shows a progress bar for several prompts.

        Raises TypeError for anything else, ValueError, before any prompt runs, for one that can never run.
        """
        return self._run_in_order(self.requests(self.encode(prompts), sampling_params), use_tqdm)

    def chat(
        self, messages: Messages | list[Messages], sampling_params: Params = None, use_tqdm: bool = True
    ) -> list[RequestOutput]:
        """Answers one conversation or several; returns their outputs in order.

        messages: a list of messages {"role": ..., "content": text}, or a list of such lists; further keys of a
        message reach the chat template as they are. The other arguments and errors are those of `generate`.
        """
        given = conversation_list(messages)
        encoded = [
            (conversation[-1]["content"], self.tokenizer.encode_chat(conversation, which(index, len(given))))
            for index, conversation in enumerate(given)
        ]
        return self._run_in_order(self.requests(encoded, sampling_params), use_tqdm)

    def stream(self, prompts: Prompt | list[Prompt], sampling_params: Params = None) -> Iterator[StreamChunk]:
        """Completes prompts and yields each chunk as it comes; arguments and errors are those of `generate`.

        Closing the iterator cancels what has not finished. Several streams may be consumed in turns.
        """
        return self.chunks(self.requests(self.encode(prompts), sampling_params))

    def score(self, token_ids: list[int]) -> torch.Tensor:
        """Log-likelihood of each token of a sequence given those before it: [T] -> float32 [T - 1], on the CPU.

        ValueError if the logits are not finite.
        """
        [request] = self.requests([("", token_id_list(token_ids))], SamplingParams(max_new_tokens=1, prompt_logprobs=0))
        for _ in self.finished([request]):
            pass
        [sequence] = request.samples
        if sequence.finish_reason == "error":
            raise ValueError(not_finite("a position", self.cause))
        return torch.cat([torch.empty(0), *(part[:, 0] for part in sequence.prompt_logprobs)])

    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """Logits [T, V] float32 after every token of one sequence, on the CPU; the same on every rank.

        ValueError naming the first position whose logits are not finite.
        """
        token_ids = token_id_list(token_ids)
        logits = self._prompt_logits(token_ids)
        if logits is None:
            # attention may have spread NaN to earlier positions: a shorter sequence is not affected
            shorter = range(1, len(token_ids))
            first = bisect_left(shorter, True, key=lambda count: self._prompt_logits(token_ids[:count]) is None)
            raise ValueError(not_finite(f"position {first}", self.cause))
        return logits

    def _prompt_logits(self, token_ids: list[int]) -> torch.Tensor | None:
        """`logits`, None if they are not finite. Every attention DP group runs the sequence."""
        requests = [
            self.requests([("", token_ids)], SamplingParams(max_new_tokens=1))[0] for _ in self.engine.schedulers
        ]
        for request in requests:
            request.samples[0].collects_logits = True
        for _ in self.finished(requests, spread=True):
            pass
        logits = torch.cat(requests[self.parallel.attn_dp.index].samples[0].prompt_logits)
        return logits if torch.stack(logits.aminmax()).isfinite().all() else None  # both are NaN if one of them is

    def exchange(self, is_prefill: bool) -> ExpertExchange:
        """Expert exchange of decode steps, or of all others."""
        return self.exchanges[is_prefill]

    def requests(self, encoded: list[tuple[str, list[int]]], sampling_params: Params = None) -> list[Request]:
        """Requests from prompts (text, token ids). ValueError for one that can never run."""
        return [
            self.request(text, token_ids, sampling, index, which(index, len(encoded)))
            for index, ((text, token_ids), sampling) in enumerate(
                zip(encoded, self._params(sampling_params, len(encoded)), strict=True)
            )
        ]

    def request(
        self,
        prompt: str,
        token_ids: list[int],
        sampling: SamplingParams,
        index: int = 0,
        name: str = "the prompt",
        request_id: str | None = None,
    ) -> Request:
        """Validates one request; ValueError. name: the prompt in errors."""
        self.limits.check(token_ids, sampling, name)
        request_id = uuid.uuid4().hex if request_id is None else request_id
        bad_words = [ids for text in sampling.bad_words for ids in self.tokenizer.bad_word_ids(text)]
        samples = [
            Sequence(
                request_id=request_id,
                index=index,
                sample=sample,
                prompt_token_ids=token_ids,
                sampling=sampling,
                random=make_random(sampling, sample),
                bad_word_ids=bad_words,
            )
            for sample in range(sampling.n)
        ]
        return Request(request_id=request_id, index=index, prompt=prompt, prompt_token_ids=token_ids, samples=samples)

    def finished(self, requests: list[Request], spread: bool = False) -> Iterator[tuple[int, RequestOutput]]:
        """Runs requests; yields (index, output) of each when it finishes. spread: request i in attention DP group i."""
        unfinished = {request.request_id: len(request.samples) for request in requests}
        for request, event in self._events(requests, spread):
            unfinished[request.request_id] -= event.is_last
            if not unfinished[request.request_id]:
                yield request.index, self.output(request)

    def chunks(self, requests: list[Request]) -> Iterator[StreamChunk]:
        """Runs requests; yields a chunk for each new token."""
        texts = {
            id(sample): TextStream(self.tokenizer, sample.sampling)
            for request in requests
            for sample in request.samples
        }
        for _, event in self._events(requests):
            yield stream_chunk(event, texts[id(event.sequence)], self.tokenizer, self.cause)

    def output(self, request: Request) -> RequestOutput:
        """Result of a finished request."""
        return request_output(request, self.tokenizer, self.cause)

    def _step(self) -> None:
        """Runs one step of the engine and puts its events into the queues of their requests."""
        if self.engine.is_stepping:
            raise RuntimeError("a mask cannot use the LLM that calls it")
        try:
            with torch.inference_mode():
                events = self.engine.step()
        except BaseException:
            self.engine.abort()
            raise
        for event in events:
            queue = self._queues.get(event.sequence.request_id)
            if queue is not None:
                queue.append(event)

    def _events(self, requests: list[Request], spread: bool = False) -> Iterator[tuple[Request, TokenEvent]]:
        """Adds requests to the engine and yields their events; cancels what has not finished when it is closed."""
        queue: deque[TokenEvent] = deque()
        by_id = {request.request_id: request for request in requests}
        unfinished = sum(len(request.samples) for request in requests)
        try:
            with self._lock:
                for number, request in enumerate(requests):
                    self._queues[request.request_id] = queue
                    self.engine.add(request.samples, number if spread else None)
            while unfinished:
                while not queue:
                    with self._lock:
                        if queue:  # another thread's step has filled it
                            break
                        if not self.engine.has_work:
                            raise RuntimeError("another request's failure has ended this one")
                        self._step()
                event = queue.popleft()
                unfinished -= event.is_last
                yield by_id[event.sequence.request_id], event
        finally:
            with self._lock:
                for request in requests:
                    if not request.is_finished:
                        self.engine.cancel(request.request_id)
                    self._queues.pop(request.request_id, None)

    def _run_in_order(self, requests: list[Request], use_tqdm: bool) -> list[RequestOutput]:
        outputs = {}
        hidden = not use_tqdm or len(requests) == 1 or self.parallel.world.index > 0
        with tqdm(total=len(requests), desc="prompts", disable=hidden) as progress:
            for index, output in self.finished(requests):
                outputs[index] = output
                progress.update()
        return [outputs[index] for index in range(len(requests))]

    def encode(self, prompts: Prompt | list[Prompt]) -> list[tuple[str, list[int]]]:
        """Encodes prompts: (text, token ids) of each; the text is empty where token ids were given."""
        given = prompt_list(prompts)
        return [
            (prompt, self.tokenizer.encode(prompt, which(index, len(given))))
            if isinstance(prompt, str)
            else ("", prompt)
            for index, prompt in enumerate(given)
        ]

    def _params(self, sampling_params: Params, count: int) -> list[SamplingParams]:
        given = self.default_sampling if sampling_params is None else sampling_params
        params = [given] * count if isinstance(given, SamplingParams) else given
        if not isinstance(params, list | tuple) or not all(isinstance(one, SamplingParams) for one in params):
            raise TypeError(
                f"sampling_params: expected one SamplingParams or a list of them, got a {type(given).__name__}"
            )
        if len(params) != count:
            raise ValueError(f"sampling_params: {len(params)} of them for {count} prompts, must be one for each")
        return list(params)

    @property
    def cause(self) -> str:
        """Likely cause of logits that are not finite."""
        if self.dtype is torch.float16:
            return "a number was probably too large for dtype float16; try bfloat16, which has the range of float32"
        return "the checkpoint's weights are probably damaged or do not fit its config.json"


def settings_of(model_path: str | Path, device: str, dtype: str, settings: dict[str, Any]) -> Settings:
    """Settings from the arguments of `LLM`; ValueError."""
    raw = {"model_name": folder_name(model_path), "model_path": str(model_path), "device": device}
    for key, value in {"dtype": dtype, **settings}.items():
        store_setting(raw, key, value)
    return settings_from_dict(raw, "LLM")
