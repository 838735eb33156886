# SPDX-License-Identifier: Apache-2.0
"""Weight files and tensor metadata of a checkpoint folder, from the safetensors index and headers only."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import safe_open

from executor.utils.reading import read_text, refusing
from executor.utils.text import one_line

logger = logging.getLogger(__name__)

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
TOOL_NAMES = ("quant_model_weight*", "gptq_model*")  # of msModelSlim and GPTQ tools, without suffix
DESCRIPTION_NAME = "quant_model_description*.json"
PICKLE_NAMES = ("pytorch_model.bin.index.json", "pytorch_model.bin")
MAX_JSON_BYTES = 64 << 20  # the index of the largest published checkpoint has 4 MB
MAX_FILES = 2000  # published checkpoints have at most a few hundred


@dataclass(frozen=True)
class StoredTensor:
    """Metadata of a tensor in a checkpoint file."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # safetensors' name, such as BF16


def read_unique_object(file: Path) -> dict[str, Any]:
    """Reads a JSON object from a file. ValueError for anything else, and for duplicate keys."""
    text = read_text(file, MAX_JSON_BYTES)
    with refusing(str(file), "not valid JSON"):
        found = json.loads(text, object_pairs_hook=unique)
    if not isinstance(found, dict):
        raise ValueError(one_line(f"{file}: expected a JSON object"))
    return found


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key[:80]!r} appears twice in one object")
        found[key] = value
    return found


def weight_files(model_path: Path) -> list[Path]:
    """Paths of the weight files: model.safetensors, else the shards of the index, as in transformers.

    Else those of other names that tools for quantisation give them. ValueError if there are none, or if a shard is
    missing.
    """
    index, single = model_path / INDEX_NAME, model_path / SINGLE_NAME
    with refusing(f"model_path: {model_path}"):
        found = [file.name for file in (single, index) if file.exists() or file.is_symlink()]
        pickles = [name for name in PICKLE_NAMES if (model_path / name).exists()]
        adapter = (model_path / "adapter_config.json").exists()
    if not found and (others := files_of_tools(model_path)):
        return others
    if not found:
        hint = f"; convert its {pickles[0]} to safetensors: pickle files run code and are not read" if pickles else ""
        raise ValueError(one_line(f"model_path: {model_path} has neither {INDEX_NAME} nor {SINGLE_NAME}{hint}"))
    if len(found) > 1:
        logger.warning("%s", one_line(f"{single} is read, {INDEX_NAME} beside it is not"))
    if adapter:
        logger.warning("%s", one_line(f"{model_path}: adapter_config.json is there, but adapters are not applied"))
    return [single] if SINGLE_NAME in found else indexed_files(model_path, index)


def files_of_tools(model_path: Path) -> list[Path]:
    """Weight files by the names of msModelSlim and GPTQ tools: those of an index, or else a single file."""
    with refusing(f"model_path: {model_path}"):
        indexes = sorted(file for name in TOOL_NAMES for file in model_path.glob(f"{name}.safetensors.index.json"))
        files = sorted(file for name in TOOL_NAMES for file in model_path.glob(f"{name}.safetensors"))
        if len(indexes) > 1 or (len(files) > 1 and not indexes):
            several = ", ".join(file.name for file in (indexes or files)[:3])
            raise ValueError(f"has several sets of weights ({several}), and no {SINGLE_NAME}: leave one")
    return indexed_files(model_path, indexes[0]) if indexes else files


def read_description(model_path: Path) -> dict[str, Any] | None:
    """Reads msModelSlim's description of the tensors; None if there is none. ValueError for several."""
    with refusing(f"model_path: {model_path}"):
        files = sorted(model_path.glob(DESCRIPTION_NAME))
        if len(files) > 1:
            raise ValueError(f"has several descriptions ({', '.join(file.name for file in files[:3])}): leave one")
    return read_unique_object(files[0]) if files else None


def indexed_files(model_path: Path, index: Path) -> list[Path]:
    problem = "not a safetensors index"
    with refusing(str(index), problem):
        raw = read_unique_object(index)
    weight_map = raw.get("weight_map")
    with refusing(str(index), problem):
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError("its weight_map has no file names")
        if not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError("its weight_map has values that are no file names")
        names = sorted(set(weight_map.values()))
        if len(names) > MAX_FILES:
            raise ValueError(f"its weight_map names {len(names)} files, more than {MAX_FILES}")
        for name in names:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(f"{name[:200]!r} is outside the checkpoint's folder")
    with refusing(str(index)):
        absent = [name for name in names if not (model_path / name).is_file()]
        if absent:
            raise ValueError(f"{some(absent)} named there but not in the folder (an incomplete download?)")
    return [model_path / name for name in names]


def read_headers(files: list[Path]) -> dict[str, StoredTensor]:
    """Reads the headers of all files: tensor name -> metadata. ValueError for a damaged file or a duplicate name."""
    found: dict[str, StoredTensor] = {}
    for file in files:
        with open_checked(file) as handle, refusing(str(file)):
            for name in handle.keys():  # noqa: SIM118 (not a dict)
                if name in found:
                    raise ValueError(f"tensor {name} is also in another file of this checkpoint")
                tensor = handle.get_slice(name)
                found[name] = StoredTensor(file, name, tuple(tensor.get_shape()), tensor.get_dtype())
    return found


def open_checked(file: Path) -> safe_open:
    """Opens a safetensors file; ValueError if it is truncated or of another format."""
    with refusing(str(file), "truncated or not a safetensors file"):
        if not file.is_file():  # opening a pipe or a device could block
            raise ValueError("not a file")
        return safe_open(file, framework="pt")


def some(names: list[str], limit: int = 3) -> str:
    """Lists the first `limit` names and the count of the others on one line, for messages."""
    shown = ", ".join(name if len(name) <= 160 else f"{name[:80]}...{name[-80:]}" for name in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")
