# SPDX-License-Identifier: Apache-2.0
"""Calls in the backend's source fit the committed schemas, and those equal the schemas of the wheels."""

import ast

import pytest
import torch

from tests.npu import schemas
from tests.npu.wheels import VERSIONS, wheel

CALLS = schemas.backend_calls()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("call", CALLS, ids=[f"{call.func.attr}-{call.lineno}" for call in CALLS])
def test_call_fits_schema(call, version):
    """Checks name, number of positional arguments, and keywords; a starred argument counts as four tensors."""
    schema = torch._C.parse_schema(f"npu::{schemas.committed_schemas(version)[call.func.attr]}")
    positional = [argument.name for argument in schema.arguments if not argument.kwarg_only]
    count = sum(4 if isinstance(argument, ast.Starred) else 1 for argument in call.args)
    assert count <= len(positional)
    given = [*positional[:count], *(keyword.arg for keyword in call.keywords)]
    assert len(set(given)) == len(given) and set(given) <= {argument.name for argument in schema.arguments}
    assert {argument.name for argument in schema.arguments if not argument.has_default_value()} <= set(given)


@pytest.mark.parametrize("version", VERSIONS)
def test_committed_schemas_are_the_wheels(version):
    file = wheel(version)
    if file is None:
        pytest.skip(f"torch_npu {version}: no wheel in the cache and no package index")
    assert schemas.committed_schemas(version) == schemas.used_schemas(file)
