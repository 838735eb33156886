# SPDX-License-Identifier: Apache-2.0
"""Asynchronous Python API for servers: requests join and leave the running batch at every step."""

import asyncio
import atexit
import contextlib
import json
import logging
import queue
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from executor.config import Settings
from executor.engine.engine import TokenEvent
from executor.engine.request import Request, stream_chunk
from executor.engine.text_stream import TextStream
from executor.llm import LLM, settings_of
from executor.loading.prompts import Prompt, prompt_list
from executor.outputs import StreamChunk
from executor.sampling_params import SamplingParams
from ops.comm import CommandChannel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Commands:
    """What arrives between two steps: new requests, ids of cancelled ones, and whether to close."""

    requests: list[Request]
    cancelled: list[str]
    is_closed: bool = False


@dataclass(eq=False)
class Client:
    """Event queue of a request, in the event loop that submitted it."""

    request: Request
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[TokenEvent | BaseException]
    unfinished: int  # samples whose last event has not been put

    def put(self, item: TokenEvent | BaseException) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self.loop.call_soon_threadsafe(self.events.put_nowait, item)


class AsyncLLM:
    """A loaded model that serves requests as they come; arguments as for `LLM`.

    The engine runs in a thread. With several ranks only rank 0 serves (`is_serving`), and broadcasts requests and
    cancellations at step boundaries; on the others `generate` raises RuntimeError, and `close` waits until rank 0
    closes.

    Example:
        llm = AsyncLLM("path/of/the/checkpoint", batch_size=8)
        async for chunk in llm.generate("Once upon a time", SamplingParams(max_new_tokens=64)):
            print(chunk.text, end="", flush=True)
        llm.close()
    """

    def __init__(self, model_path: str | Path, device: str = "auto", dtype: str = "bfloat16", **settings: Any):
        self._start(settings_of(model_path, device, dtype, settings))

    @classmethod
    def from_settings(cls, settings: Settings) -> "AsyncLLM":
        """Loads what checked settings describe."""
        llm = cls.__new__(cls)
        llm._start(settings)
        return llm

    def _start(self, settings: Settings) -> None:
        self.llm = LLM.from_settings(settings, fills_memory=True)
        several = self.llm.parallel.world.size > 1
        self.channel = CommandChannel() if several else None
        self.is_serving = self.llm.parallel.world.index == 0
        self.inbox: queue.SimpleQueue[Request | str | None] = queue.SimpleQueue()  # request, id to cancel, None: close
        self.clients: dict[str, Client] = {}  # request id -> client; changed under `lock`
        self.lock = threading.Lock()
        self.failure: BaseException | None = None  # why the engine has ended
        self.closed_error = RuntimeError("it was closed")
        self.is_closed = False
        if self.is_serving:
            atexit.register(self.close)  # a thread that is inside torch when the interpreter ends aborts the process
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.thread.start()

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, request_id: str | None = None
    ) -> AsyncIterator[StreamChunk]:
        """Completes a prompt (a text or token ids) and yields each chunk as it comes.

        Ending the iteration early cancels the request. Raises ValueError and TypeError as `LLM.generate` for a request
        that can never run, RuntimeError if the engine has failed or is closed.
        """
        request = self._request(prompt, sampling_params, request_id)
        unfinished = len(request.samples)
        client = Client(request, asyncio.get_running_loop(), asyncio.Queue(), unfinished)
        self._submit(client)
        texts = {id(sample): TextStream(self.llm.tokenizer, sample.sampling) for sample in request.samples}
        try:
            while unfinished:
                event = await client.events.get()
                if isinstance(event, BaseException):
                    raise RuntimeError(f"the engine has ended: {event}") from event
                unfinished -= event.is_last
                yield stream_chunk(event, texts[id(event.sequence)], self.llm.tokenizer, self.llm.cause)
        finally:
            if unfinished:
                self.abort(request.request_id)

    def abort(self, request_id: str) -> None:
        """Cancels a request: its stream ends with finish_reason "cancelled". Unknown ids are ignored."""
        self.inbox.put(checked_id(request_id))

    def close(self) -> None:
        """Cancels all requests, ends the engine and waits for it; on other ranks, waits until rank 0 closes.

        On those, raises RuntimeError if the engine has failed.
        """
        self.is_closed = True
        if self.is_serving:
            atexit.unregister(self.close)
            self.inbox.put(None)
        self.thread.join()
        if not self.is_serving and self.failure is not self.closed_error:
            raise RuntimeError(f"the engine has failed: {self.failure}") from self.failure

    def _request(self, prompt: Prompt, sampling_params: SamplingParams | None, request_id: str | None) -> Request:
        if not self.is_serving:
            raise RuntimeError("only rank 0 serves requests")
        if request_id is not None:
            checked_id(request_id)
        prompts = prompt_list(prompt)
        if len(prompts) != 1:
            raise TypeError(f"prompt: expected one prompt, got {len(prompts)}")
        [(text, token_ids)] = self.llm.encode(prompts)
        sampling = self.llm.default_sampling if sampling_params is None else sampling_params
        if not isinstance(sampling, SamplingParams):
            raise TypeError(f"sampling_params: expected a SamplingParams, got a {type(sampling).__name__}")
        if self.channel is not None and sampling.mask is not None:
            raise ValueError("mask: only possible on one rank, a function cannot be sent to the others")
        return self.llm.request(text, token_ids, sampling, request_id=request_id)

    def _submit(self, client: Client) -> None:
        with self.lock:
            if self.failure is not None or self.is_closed:
                raise RuntimeError(f"the engine has ended: {self.failure or self.closed_error}")
            if client.request.request_id in self.clients:
                raise ValueError(f"request_id: {client.request.request_id!r} is in use by another request")
            self.clients[client.request.request_id] = client
        self.inbox.put(client.request)

    @torch.inference_mode()
    def _run(self) -> None:
        """Engine thread: applies commands, then runs a step, until it is closed or fails."""
        failure: BaseException = self.closed_error
        try:
            while not self._apply(self._next_commands()):
                for event in self.llm.engine.step():
                    self._deliver(event)
        except BaseException as error:
            failure = error
            logger.exception("the engine has failed")
        with self.lock:
            self.failure = failure
            clients, self.clients = list(self.clients.values()), {}
        for client in clients:
            client.put(failure)

    def _next_commands(self) -> Commands:
        """Commands since the last step, the same on every rank; blocks while the engine is idle and none have come."""
        commands = Commands([], [])
        if self.is_serving:
            commands = self._drain(wait=not self.llm.engine.has_work)
        if self.channel is None:
            return commands
        data = self.channel.broadcast(b"" if commands == Commands([], []) else to_json(commands))
        return commands if self.is_serving or not data else self._from_json(data)

    def _from_json(self, data: bytes) -> Commands:
        """Commands of rank 0."""
        sent = json.loads(data)
        requests = []
        for one in sent["requests"]:
            sampling = one["sampling"]
            if sampling["logit_bias"] is not None:
                sampling["logit_bias"] = {int(token_id): bias for token_id, bias in sampling["logit_bias"].items()}
            params = SamplingParams(**sampling)
            requests.append(self.llm.request("", one["token_ids"], params, request_id=one["request_id"]))
        return Commands(requests, sent["cancelled"], sent["is_closed"])

    def _drain(self, wait: bool) -> Commands:
        """Empties the inbox. wait: blocks until something is in it."""
        requests: list[Request] = []
        cancelled: list[str] = []
        is_closed = False
        while wait or not self.inbox.empty():
            item = self.inbox.get()
            wait = False
            if isinstance(item, Request):
                requests.append(item)
                # an earlier cancellation was of an ended request with the same id
                cancelled = [request_id for request_id in cancelled if request_id != item.request_id]
            elif item is not None:
                cancelled.append(item)
            else:
                is_closed = True
        return Commands(requests, cancelled, is_closed)

    def _apply(self, commands: Commands) -> bool:
        """Adds and cancels requests; returns whether the engine is closed."""
        for request in commands.requests:
            self.llm.engine.add(request.samples)
        for request_id in commands.cancelled:
            self.llm.engine.cancel(request_id)
        if commands.is_closed:
            self.llm.engine.abort()
        return commands.is_closed

    def _deliver(self, event: TokenEvent) -> None:
        """Hands an event to its client; forgets the client after the last one of its request."""
        client = self.clients.get(event.sequence.request_id)
        if client is None:
            return
        client.unfinished -= event.is_last
        if not client.unfinished:  # samples may end in one step: `request.is_finished` is then true at the first event
            with self.lock:
                del self.clients[event.sequence.request_id]
        client.put(event)


def checked_id(request_id: str) -> str:
    """Returns a request's id; TypeError if it is no text."""
    if not isinstance(request_id, str):
        raise TypeError(f"request_id: expected a text, got a {type(request_id).__name__}")
    return request_id


def to_json(commands: Commands) -> bytes:
    """Commands for the other ranks, which tokenise bad words and draw random numbers themselves."""
    requests = []
    for request in commands.requests:
        sampling = vars(request.samples[0].sampling) | {"mask": None}
        requests.append({"request_id": request.request_id, "token_ids": request.prompt_token_ids, "sampling": sampling})
    sent = {"requests": requests, "cancelled": commands.cancelled, "is_closed": commands.is_closed}
    return json.dumps(sent).encode()
