# SPDX-License-Identifier: Apache-2.0
"""The torch_npu operations the recipe uses, computed on CPU tensors under the vendor's own schemas.

`install(wheel)` makes `import torch_npu`, `torch_npu.npu_xxx(...)` and `torch.ops.npu.*` work in this process.
An operation returns what its documentation says, raises where the documentation forbids the call, and fills what the
documentation leaves undefined with NaN or large integers, so that code that reads it fails.
A captured graph records calls and replays them on the same memory; what a device cannot capture is refused.
It replaces the namespace `npu` and `sys.modules["torch_npu"]`: give it a process of its own.
"""

from tests.npu.emulator.communicators import comm_name
from tests.npu.emulator.install import install
from tests.npu.emulator.registry import set_product

__all__ = ["comm_name", "install", "set_product"]
