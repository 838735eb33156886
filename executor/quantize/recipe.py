# SPDX-License-Identifier: Apache-2.0
"""How a matrix is quantised, and the quantization_config that declares it: compressed-tensors' W8A8 and W4A16.

Keys of the configuration are those that llmcompressor 0.14 writes with compressed-tensors 0.19.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from models.quantization.int4 import pack_quantized_tensors
from models.quantization.int8 import w8a8_tensors
from models.quantization.rounding import round_int4, round_int4_clipped, round_int8
from ops.int4 import PER_WORD
from ops.weight import dequantize

FORMATS = {"w8a8": "int-quantized", "w4a16": "pack-quantized"}
WRITER_VERSION = "0.19.0"  # of compressed-tensors


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Number format of the quantised weights. group_size and symmetric: of w4a16."""

    scheme: str
    group_size: int = 128
    symmetric: bool = True

    def quantize(
        self, module: str, weight: torch.Tensor, dtype: torch.dtype, importance: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Rounds a matrix [N, K]; returns the tensors to store by name.

        dtype: of the scales. importance: mean squares [K] of the layer's inputs, if known; w4a16 takes them into
        account.
        """
        if self.scheme == "w8a8":
            return w8a8_tensors(module, round_int8(weight, dtype))
        rounded = round_int4_clipped(weight, self.group_size, self.symmetric, dtype, importance)
        return pack_quantized_tensors(module, rounded)

    @lru_cache  # noqa: B019 (a command has one recipe)
    def stored(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of what `quantize` returns for a matrix of `shape`, by name after the module's."""
        weight = torch.empty(shape, dtype=dtype, device="meta")  # nothing is computed
        if self.scheme == "w8a8":
            tensors = w8a8_tensors("", round_int8(weight))
        else:
            tensors = pack_quantized_tensors("", round_int4(weight, self.group_size, self.symmetric))
        return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}

    def nearest(self, weight: torch.Tensor) -> torch.Tensor:
        """Rounds a float32 matrix [N, K] to w4a16 without search, and back to float32."""
        return dequantize(round_int4(weight, self.group_size, self.symmetric), torch.float32)

    def check_widths(self, widths: Mapping[str, int]) -> None:
        """Raises ValueError if the columns of a matrix (by name) cannot be divided into groups."""
        if self.scheme == "w8a8":
            return
        common = math.gcd(*widths.values())
        legal = [size for size in range(PER_WORD, common + 1, PER_WORD) if common % size == 0]
        if not legal:
            name = next(name for name, width in widths.items() if width % PER_WORD)
            raise ValueError(
                f"--scheme: w4a16 needs widths that are multiples of {PER_WORD}, {name} has {widths[name]} columns"
            )
        if self.group_size not in legal:
            odd = next((name for name, width in widths.items() if width % self.group_size), None)
            why = f"{odd} has {widths[odd]} columns" if odd else f"{PER_WORD} values are packed to a word"
            raise ValueError(
                f"--group-size: {self.group_size} is impossible, {why}; possible: {', '.join(map(str, legal))}"
            )

    def configuration(self, ignore: Sequence[str]) -> dict[str, Any]:
        """The quantization_config of config.json; ignore: names of the linear modules that stay float."""
        if self.scheme == "w8a8":
            weights = arguments(num_bits=8, strategy="channel", observer="memoryless_minmax")
            inputs: dict[str, Any] | None = arguments(num_bits=8, strategy="token", dynamic=True)
        else:
            inputs = None
            weights = arguments(
                num_bits=4,
                strategy="group",
                group_size=self.group_size,
                symmetric=self.symmetric,
                observer="memoryless_mse",
                zp_dtype=None if self.symmetric else "torch.int8",
            )
        group = {
            "format": FORMATS[self.scheme],
            "input_activations": inputs,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": weights,
        }
        return {
            "config_groups": {"group_0": group},
            "format": FORMATS[self.scheme],
            "global_compression_ratio": None,
            "ignore": list(ignore),
            "kv_cache_scheme": None,
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "sparsity_config": {},
            "transform_config": {},
            "version": WRITER_VERSION,
        }


def arguments(**stated: Any) -> dict[str, Any]:
    """Arguments of compressed-tensors for weights or activations."""
    defaults: dict[str, Any] = {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": None,
        "num_bits": None,
        "observer": None,
        "observer_kwargs": {},
        "scale_dtype": None,
        "strategy": None,
        "symmetric": True,
        "type": "int",
        "zp_dtype": None,
    }
    assert stated.keys() <= defaults.keys()
    return defaults | stated
