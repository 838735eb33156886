# SPDX-License-Identifier: Apache-2.0
"""Access to torch.ops.npu with overloads resolved once."""

import torch
import torch_npu  # noqa: F401  registers torch.ops.npu


class DefaultOverloads:
    """Caches the default overload of each operation of torch.ops.npu: resolving it costs host time in every call.

    Raises AttributeError for an operation that the installed torch_npu lacks.
    """

    def __getattr__(self, name: str) -> torch._ops.OpOverload:
        operation = getattr(torch.ops.npu, name).default
        setattr(self, name, operation)
        return operation


npu = DefaultOverloads()
