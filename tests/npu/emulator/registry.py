# SPDX-License-Identifier: Apache-2.0
"""Registration of emulated operations, checks of their arguments, and poison for undefined values."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

ND, FRACTAL_NZ = 2, 29
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
HALVES = (torch.float16, torch.bfloat16)
PRODUCTS = ("A2", "A3")
POISON_INT = {
    torch.bool: True,
    torch.uint8: 0xA5,
    torch.int8: -128,
    torch.int16: 0x7A5A,
    torch.int32: 0x7A5A5A5A,
    torch.int64: 0x7A5A5A5A5A5A5A5A,
}


class Kernel(NamedTuple):
    function: Callable
    nz: tuple[str, ...]  # the arguments that may be FRACTAL_NZ


KERNELS: dict[str, Kernel] = {}
_product = "A3"
_takes_tiled_cache = False
_formats: dict[int, StorageWeakRef] = {}  # storages in FRACTAL_NZ; the weak reference keeps the address from reuse


def set_product(name: str) -> None:
    """Sets the product whose rules apply: "A2" (Ascend910B) or "A3" (Ascend910_93). ValueError for any other."""
    global _product
    require(name in PRODUCTS, f"product '{name}': allowed are {', '.join(PRODUCTS)}")
    _product = name


def product() -> str:
    return _product


def set_tiled_cache(taken: bool) -> None:
    """Sets whether fused attention without a rope takes NZ caches, as it does from CANN 9.1 on."""
    global _takes_tiled_cache
    _takes_tiled_cache = taken


def takes_tiled_cache() -> bool:
    return _takes_tiled_cache


def require(condition: object, message: str) -> None:
    """Raises ValueError with `message` unless `condition` holds: the vendor's documentation forbids the call."""
    if not condition:
        raise ValueError(message)


def require_dtype(name: str, tensor: torch.Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    names = ", ".join(str(dtype) for dtype in allowed)
    require(tensor.dtype in allowed, f"{name} is {tensor.dtype}; allowed: {names}")


def require_same_dtype(**tensors: torch.Tensor) -> None:
    text = ", ".join(f"{name} {tensor.dtype}" for name, tensor in tensors.items())
    require(len({tensor.dtype for tensor in tensors.values()}) == 1, f"dtypes differ: {text}")


def require_shape(name: str, tensor: torch.Tensor, *shape: int) -> None:
    require(tuple(tensor.shape) == shape, f"{name} is {list(tensor.shape)}, not {list(shape)}")


def require_contiguous(**tensors: torch.Tensor | None) -> None:
    for name, tensor in tensors.items():
        require(tensor is None or tensor.is_contiguous(), f"{name} is not contiguous")


def is_transposed(tensor: torch.Tensor) -> bool:
    """Whether the last two dimensions are swapped in memory, which matmuls read as a transposed operand."""
    return not tensor.is_contiguous() and tensor.transpose(-1, -2).is_contiguous()


def require_not_empty(**tensors: torch.Tensor) -> None:
    for name, tensor in tensors.items():
        require(tensor.numel() > 0, f"{name} {list(tensor.shape)} is empty")


def poison(shape: tuple[int, ...] | list[int] | torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of undefined values: NaN, or integers that no index or count takes."""
    return torch.full(tuple(shape), torch.nan if dtype.is_floating_point else POISON_INT[dtype], dtype=dtype)


def npu_format(tensor: torch.Tensor) -> int:
    return FRACTAL_NZ if tensor.untyped_storage()._cdata in _formats else ND


def mark_nz(tensor: torch.Tensor) -> None:
    for address in [address for address, reference in _formats.items() if reference.expired()]:
        del _formats[address]
    storage = tensor.untyped_storage()
    _formats[storage._cdata] = StorageWeakRef(storage)


def kernel(*names: str, nz: tuple[str, ...] = ()) -> Callable[[Callable], Callable]:
    """Registers a function as the CPU kernel of the named operations. Its parameters carry the schema's names.

    A schema argument that the function does not take must be left at its default (else NotImplementedError); a
    parameter that the wheel's schema lacks keeps the function's own default.
    """

    def register(function: Callable) -> Callable:
        for name in names:
            KERNELS[name] = Kernel(function, nz)
        return function

    return register


def _require_format(op: str, name: str, value: Any, nz: tuple[str, ...]) -> None:
    for tensor in value if isinstance(value, list | tuple) else (value,):
        if isinstance(tensor, torch.Tensor) and npu_format(tensor) == FRACTAL_NZ:
            require(name in nz, f"{op}: {name} is FRACTAL_NZ; only ND is allowed")
            whole = tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
            require(whole, f"{op}: {name} is a slice of a FRACTAL_NZ tensor, whose storage is tiled")


def adapt(schema: torch.FunctionSchema, kernel: Kernel) -> Callable:
    """The kernel as the dispatcher calls it: every argument by its schema name, defaults from the schema."""
    # the schema's defaults hold, not the function's: they differ between versions of torch_npu
    known = [{"self": "input"}.get(argument.name, argument.name) for argument in schema.arguments]
    defaults = {
        name: argument.default_value
        for name, argument in zip(known, schema.arguments, strict=True)
        if argument.has_default_value()
    }
    taken = inspect.signature(kernel.function).parameters

    def call(*args: Any, **kwargs: Any) -> Any:
        given = defaults | dict(zip(known, args, strict=False)) | kwargs
        for name, value in given.items():
            if name not in taken and value is not None and value != defaults.get(name):
                raise NotImplementedError(f"{schema.name}: the emulator has no {name}={value!r}")
            _require_format(schema.name, name, value, kernel.nz)
        return kernel.function(**{name: value for name, value in given.items() if name in taken})

    return call
