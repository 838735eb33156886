# SPDX-License-Identifier: Apache-2.0
"""torch_npu's operations, called the short way."""

import torch
import torch_npu  # noqa: F401  registers torch.ops.npu


class DefaultOverloads:
    """torch.ops.npu with the default overload of each operation: choosing one costs the host time in every call.

    AttributeError for an operation that the installed torch_npu has not.
    """

    def __getattr__(self, name: str) -> torch._ops.OpOverload:
        operation = getattr(torch.ops.npu, name).default
        setattr(self, name, operation)
        return operation


npu = DefaultOverloads()
