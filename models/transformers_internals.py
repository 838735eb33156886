# SPDX-License-Identifier: Apache-2.0
"""Adapter for the undocumented parts of transformers that the project depends on."""

import importlib
import importlib.util
import sys
import types
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

MODELS = "transformers.models"
MODEL_CLASSES = f"{MODELS}.auto.modeling_auto"


class UnreadModels(types.ModuleType):
    """Package `transformers.models`, executed when one of its names, other than a submodule's, is first looked up.

    Executing it reads the sources of all models, 0.5 s of CPU, to list their classes: `transformers` has done so
    already, and imports of submodules do not need it.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {MODELS!r} has no attribute {name!r}")
        if importlib.util.find_spec(f"{MODELS}.{name}"):
            return importlib.import_module(f"{MODELS}.{name}")
        if type(sys.modules[MODELS]) is UnreadModels:
            del sys.modules[MODELS]
        return getattr(importlib.import_module(MODELS), name)


if MODELS not in sys.modules:
    spec = importlib.util.find_spec(MODELS)
    assert spec is not None
    sys.modules[MODELS] = importlib.util.module_from_spec(spec)
    sys.modules[MODELS].__class__ = UnreadModels

if MODEL_CLASSES not in sys.modules:
    # transformers imports them, for seconds, to name one in the docstring of the config class, or does without
    sys.modules[MODEL_CLASSES] = None  # type: ignore[assignment]  # an import of it raises ImportError
    with suppress(ImportError):
        import transformers.models.qwen3_moe.configuration_qwen3_moe  # noqa: F401
    del sys.modules[MODEL_CLASSES]

from transformers import ROPE_INIT_FUNCTIONS, Qwen3MoeConfig, RopeParameters  # noqa: E402

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Rope types that `scaled_rope_frequencies` supports; transformers documents no list of them.
SCALED_ROPE_TYPES = tuple(ROPE_INIT_FUNCTIONS)
# Keys that any rope type reads: the TypedDict is documented, its annotations are not.
ROPE_PARAMETER_KEYS = frozenset(RopeParameters.__annotations__)


def scaled_rope_frequencies(config: Qwen3MoeConfig, seq_len: int | None = None) -> tuple[torch.Tensor, float]:
    """Computes RoPE inverse frequencies [C / 2] float32, and the attention scaling factor that multiplies cos and sin.

    Some rope types depend on `seq_len`. Bitwise equal to transformers' models, as it calls the same functions.
    """
    return ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, torch.device("cpu"), seq_len=seq_len)


def compute_rope_buffers(model: "PreTrainedModel", device: torch.device) -> None:
    """Computes the non-persistent rotary buffers of a model created on the meta device: no state dict contains them."""
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
