# SPDX-License-Identifier: Apache-2.0
"""Writes safetensors files tensor by tensor, and the other files of a checkpoint; a file appears whole or not at all.

File format: https://github.com/huggingface/safetensors#format. As that library writes them, tensors are ordered by
decreasing element size, so that all are aligned.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch

from executor.loading.stored_model import DTYPES

NAMES = {dtype: name for name, dtype in DTYPES.items()}  # as safetensors spells them
ALIGNMENT = 8  # of the first tensor
Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # dtype and shape of each tensor


class TensorFile:
    """A safetensors file that is being written, in any order; one tensor or part of it is in memory at a time."""

    def __init__(self, stream: BinaryIO, tensors: Layout):
        self.stream = stream
        self.missing = 0  # bytes
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self.starts: dict[str, int] = {}
        for name in sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name)):
            dtype, shape = tensors[name]
            end = self.missing + math.prod(shape) * dtype.itemsize
            entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [self.missing, end]}
            self.starts[name], self.missing = self.missing, end
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % ALIGNMENT)
        stream.write(len(header).to_bytes(8, "little") + header)
        self.begin = stream.tell()

    def write(self, name: str, tensor: torch.Tensor, offset_bytes: int = 0) -> None:
        """Writes a tensor, or the part of it that begins at `offset_bytes`."""
        self.stream.seek(self.begin + self.starts[name] + offset_bytes)
        self.stream.write(tensor.contiguous().flatten().view(torch.uint8).numpy())
        self.missing -= tensor.nbytes


@contextmanager
def tensor_file(file: Path, tensors: Layout) -> Iterator[TensorFile]:
    """Creates `file` from what the block writes, when it ends without an error."""
    with synced(file) as stream:
        writing = TensorFile(stream, tensors)
        yield writing
        assert writing.missing == 0, f"{writing.missing} bytes of {file.name} were not written"


@contextmanager
def synced(file: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file that replaces `file` when its data is on the disk; it is removed on an error."""
    part = file.with_name(f"{file.name}.part")
    try:
        with open(part, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(file)
        sync_folder(file.parent)
    finally:
        part.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(file: Path, text: str) -> None:
    with synced(file) as stream:
        stream.write(text.encode())


def copy_file(source: Path, target: Path) -> None:
    with open(source, "rb") as read, synced(target) as stream:
        shutil.copyfileobj(read, stream)
