# SPDX-License-Identifier: Apache-2.0
"""Selection among variants of vendor calls: the first that is installed and passes its probe call."""

import logging
from collections.abc import Callable, Collection
from typing import Any

import torch

from ops.npu.variants import PROBES
from ops.reference import ReferenceOps

logger = logging.getLogger(__name__)


class NpuBindings(ReferenceOps):
    """Which variants are in use on `device`, which is an NPU, or for tests any other."""

    def __init__(self, device: str):
        super().__init__(grouped_mm=True)
        self.device = device
        self.on_npu = torch.device(device).type == "npu"
        self.bindings: dict[str, str] = {}  # family -> variant in use
        self.replaced: list[str] = []  # families that use a variant other than the preferred one

    def fallbacks(self, dtype: torch.dtype, formats: Collection[str] = ()) -> list[str]:
        """As in the interface; of quantised formats those whose weights were loaded."""
        return super().fallbacks(dtype, formats) + self.replaced

    def select_variant(
        self, what: str, variants: dict[str, Any], probe_variant: Callable[[Any, str], None] | None = None
    ) -> Any:
        """Returns the first variant that is installed and passes its probe call; RuntimeError if there is none."""
        errors = []
        for name, variant in variants.items():
            try:
                (probe_variant or PROBES[what])(variant, self.device)
                if self.on_npu:
                    torch.npu.synchronize()  # launch errors are asynchronous
            except (RuntimeError, AttributeError) as error:
                errors.append(f"{name}: {str(error).splitlines()[0]}")
                logger.info("ops: npu lacks %s", errors[-1])
                continue
            self.bindings[what] = name
            if errors and what != "qkv":  # that of older CANN versions is no worse, only more launches
                self.replaced.append(f"{what} ({name})")
            return variant
        raise RuntimeError(f"device: npu has no working operation for {what}: {'; '.join(errors)}")
