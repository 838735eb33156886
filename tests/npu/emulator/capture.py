# SPDX-License-Identifier: Apache-2.0
"""What a graph capture records, and what it refuses.

Every call that reaches the dispatcher is recorded, collectives too. The kernels run once, to learn the shapes; at the
end the tensors they made are poisoned and those they changed hold their former values, as after a capture on a device,
which computes nothing.

Operations that need a host sync for their result's shape or value are refused, by torch's tags and the names below.
Not detected: copies between host and device, which are the same here, and inputs freed before a replay.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tests.npu.emulator.registry import poison
from tests.npu.emulator.streams import DEVICE, Capture, refuse_in_capture

ATTENTION = ("npu_fused_infer_attention_score", "npu_fused_infer_attention_score_v2")
UPDATABLE = {f"{name}.{form}" for name in ATTENTION for form in ("default", "out")}
INDEXING = {"aten.index.Tensor", "aten.index_put.default", "aten.index_put_.default", "aten._index_put_impl_.default"}
HOST_SPLITS = {"c10d.alltoall_base_.default", "_c10d_functional.all_to_all_single.default"}
SYNCHRONISING = {"c10d.barrier.default", "c10d.monitored_barrier_.default"}
HOST_READS = {"tolist", "numpy", "cpu", "__array__", "__repr__"}
HOST_TENSORS = {"tensor", "as_tensor"}


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _alias(tree: Any) -> Any:
    """Aliases tensors, so that the caller's in-place metadata changes do not affect the graph's."""
    return tree_map_only(torch.Tensor, torch.Tensor.detach, tree)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _run(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    results = func(*args, **kwargs)
    for leaf in tree_leaves(results):
        if isinstance(leaf, torch.ScriptObject):  # a collective's Work
            leaf.wait()
    return results


@dataclass(eq=False)
class Call:
    """A recorded call. `outputs` are its results in order, None where one lies in an argument's memory."""

    func: Any
    args: tuple
    kwargs: dict[str, Any]
    outputs: list[torch.Tensor | None]
    updatable: bool
    updated: bool = False

    def replay(self) -> None:
        self.updated = False
        results = _tensors(_run(self.func, self.args, self.kwargs))
        for output, result in zip(self.outputs, results, strict=True):
            if output is not None:
                output.copy_(result)

    def poison(self) -> None:
        for output in self.outputs:
            if output is not None:
                output.copy_(poison(output.shape, output.dtype))


def _synchronises(func: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether the call needs a host sync, for an argument or for its result's shape."""
    name = str(func)
    if name in INDEXING:  # a mask is first turned into indices
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    if name in HOST_SPLITS:
        return any(isinstance(argument, list | tuple) and argument for argument in args)
    if name == "aten.repeat_interleave.Tensor" and kwargs.get("output_size") is not None:
        return False
    tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    return name in SYNCHRONISING or not tags.isdisjoint(func.tags)


class Recorder(TorchDispatchMode):
    def __init__(self, capture: Capture, dispatches: bool) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._capture, self._dispatches = capture, dispatches
        self._made: set[int] = set()  # storages allocated in the capture; the calls keep them alive
        self._before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # changed storages: memory and former bytes
        self._scattered: int | None = None  # storage of a reduce_scatter's output, until its caller has waited

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if self._scattered is not None:
            return self._finish_scatter(func, args)
        if DEVICE.current not in self._capture.streams:
            self._capture.refuse(f"{func} on a stream that has not joined the capture")
        if _synchronises(func, args, kwargs):
            self._capture.refuse(str(func))
        with self:
            results = func.decompose(*args, **kwargs)
        if results is not NotImplemented:
            return results
        return self._record(func, args, kwargs)

    def _record(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        inputs = _tensors((args, kwargs))
        # the schemas of collectives and of fused attention into `out` do not say what they change
        if func._schema.is_mutable or func.namespace == "c10d" or "out" in kwargs:
            self._keep(inputs)
        recorded = _alias(args), _alias(kwargs)
        results = _run(func, args, kwargs)
        borrowed = {_storage(tensor) for tensor in inputs}
        outputs = [None if _storage(tensor) in borrowed else tensor.detach() for tensor in _tensors(results)]
        self._made |= {_storage(output) for output in outputs if output is not None}
        self.calls.append(Call(func, *recorded, outputs, self._dispatches and func.__name__ in UPDATABLE))
        if str(func) == "c10d._reduce_scatter_base_.default":
            self._scattered = _storage(args[0])
        return results

    def _finish_scatter(self, func: Any, args: tuple) -> Any:
        """Runs unrecorded the copy of this rank's part that Gloo makes at each wait, after reducing the whole."""
        if func is torch.ops.aten.copy_.default and _storage(args[0]) == self._scattered:
            self._scattered = None
        elif func not in (torch.ops.aten.chunk.default, torch.ops.aten.split.Tensor):
            raise RuntimeError(f"{func} before the end of a reduce_scatter")
        return func(*args)

    def _keep(self, tensors: list[torch.Tensor]) -> None:
        for tensor in tensors:
            if _storage(tensor) not in self._made and _storage(tensor) not in self._before:
                memory = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                self._before[_storage(tensor)] = memory, memory.clone()

    def undo(self) -> None:
        """Leaves the memory as if no kernel had run."""
        with torch.inference_mode():
            for memory, before in self._before.values():
                memory.copy_(before)
            for call in self.calls:
                call.poison()


class HostReads(TorchFunctionMode):
    """Refuses host reads that bypass the dispatcher on CPU tensors, and device tensors built from host values."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in HOST_READS or (name in HOST_TENSORS and kwargs.get("device") is not None):
            refuse_in_capture(f"torch.{name}" if name in HOST_TENSORS else f"Tensor.{name}")
        return func(*args, **kwargs)
