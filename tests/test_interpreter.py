# SPDX-License-Identifier: Apache-2.0
"""Types in the interpreter that tests/interpreter.py makes faster equal Triton's, and debug mode reports overflows."""

import dataclasses

import numpy as np
import pytest

pytest.importorskip("triton", reason="it makes Triton's interpreter faster")

import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

SCALARS = {tl.int1: bool, tl.int32: np.int32, tl.uint8: np.uint8, tl.bfloat16: np.uint16, tl.float32: np.float32}


def tensor(value: int, shape: tuple[int, ...] = (4,)) -> tl.tensor:
    handle = interpreter.TensorHandle(np.full(shape, value, np.int32), tl.int32)
    return tl.tensor(handle, tl.block_type(tl.int32, list(shape)))


@pytest.mark.parametrize("scalar", SCALARS, ids=str)
def test_numpy_types(scalar):
    assert interpreter._get_np_dtype(scalar) == SCALARS[scalar]
    assert interpreter._get_np_dtype(tl.block_type(scalar, [4])) == SCALARS[scalar]
    pointer = tl.pointer_type(scalar)
    assert interpreter._get_np_dtype(pointer) == interpreter._get_np_dtype(tl.block_type(pointer, [4])) == np.uint64


@pytest.mark.parametrize("scalar", [*SCALARS, tl.pointer_type(tl.float32)], ids=str)
def test_types_of_blocks(scalar):
    made = tl.block_type(tl.int64, [2, 8]).with_element_ty(scalar)
    assert made == tl.block_type(scalar, [2, 8]) != tl.block_type(tl.int64, [2, 8])
    assert made.numel == 16 and made.name == tl.block_type(scalar, [2, 8]).name


def test_types_of_shapes():
    made = tensor(0, (2, 8)).shape.type
    expected = tl.core.tuple_type([tl.core.constexpr_type(2), tl.core.constexpr_type(8)])
    assert made == expected and expected == made and str(made) == str(expected) and made[1] == expected[1]
    assert list(made) == expected.types and made.fields == expected.fields
    assert made != tensor(0, (2, 4)).shape.type and made == tensor(1, (2, 8)).shape.type
    with pytest.raises(AttributeError):
        made.nonsense  # noqa: B018


@pytest.mark.parametrize("debug", [True, False])
def test_overflows_in_debug_mode(debug, monkeypatch):
    builder = interpreter.InterpreterBuilder()
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, debug=debug))
    semantic = interpreter.TritonSemantic(builder)
    assert (semantic.add(tensor(3), tensor(4), True).handle.data == 7).all()
    if debug:
        with pytest.raises(AssertionError, match="overflow"):
            semantic.add(tensor(2**31 - 1), tensor(1), True)
    else:
        assert (semantic.add(tensor(2**31 - 1), tensor(1), True).handle.data == -(2**31)).all()
