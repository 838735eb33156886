# SPDX-License-Identifier: Apache-2.0
"""Memory limits of this process's control groups (containers, batch systems, systemd).

Sources: the kernel's Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst; proc(5) for /proc/self/cgroup
and /proc/self/mountinfo.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

# memory.high throttles, memory.max is the hard limit; they exist only where the memory controller is enabled.
LIMITS = {"cgroup2": ("memory.max", "memory.high"), "cgroup": ("memory.limit_in_bytes",)}
USAGE = {"cgroup2": "memory.current", "cgroup": "memory.usage_in_bytes"}
# The page cache of files counts as usage, but is reclaimable. Version 1 gives hierarchical sums as total_*.
RECLAIMABLE = {"cgroup2": ("inactive_file", "active_file"), "cgroup": ("total_inactive_file", "total_active_file")}


def memory_left_bytes(root: Path = Path("/")) -> int | None:
    """Bytes left under the tightest limit of this process's control groups and their parents; None if unlimited.

    root: the folder that holds proc and sys. Unreadable files mean no limit.
    """
    left = [
        max(0, min(limits) - used_bytes(folder, kind))
        for kind, folder in control_groups(root)
        if (limits := [limit for name in LIMITS[kind] if (limit := read_number(folder / name)) is not None])
    ]
    return min(left, default=None)


def used_bytes(folder: Path, kind: str) -> int:
    """Memory usage of a group in bytes, without reclaimable page cache."""
    reclaimable = 0
    for line in read_lines(folder / "memory.stat"):
        name, _, number = line.partition(" ")
        if name in RECLAIMABLE[kind] and number.isdecimal():
            reclaimable += int(number)
    return max(0, (read_number(folder / USAGE[kind]) or 0) - reclaimable)


def control_groups(root: Path) -> Iterator[tuple[str, Path]]:
    """Yields (file system type, folder) of every visible control group that can limit this process's memory."""
    paths = {}
    for line in read_lines(root / "proc/self/cgroup"):
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0" and not controllers:
            paths["cgroup2"] = path
        elif "memory" in controllers.split(","):
            paths["cgroup"] = path
    for kind, mounted, mount_point in memory_mounts(root):
        if kind in paths:
            # In a container /proc/self/cgroup may name a path outside the mount; its group is then the mount point.
            below = PurePosixPath(os.path.relpath(paths[kind], mounted))
            top = root / mount_point.lstrip("/")
            folder = top / below
            if ".." in below.parts or not folder.is_dir():
                below = PurePosixPath()
            yield from ((kind, top / part) for part in (below, *below.parents))


def memory_mounts(root: Path) -> Iterator[tuple[str, str, str]]:
    """Yields (file system type, group at its root, mount point) of mounted cgroup hierarchies that can limit memory."""
    for line in read_lines(root / "proc/self/mountinfo"):
        fields, _, source = line.partition(" - ")
        kind, _, options = source.partition(" ")
        if kind == "cgroup2" or (kind == "cgroup" and "memory" in re.split("[ ,]", options)):
            mounted, mount_point = fields.split(" ")[3:5]
            yield kind, unescaped(mounted), unescaped(mount_point)


def unescaped(text: str) -> str:
    r"""Decodes the octal escapes of mountinfo, such as \040 for a space."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def read_lines(file: Path) -> list[str]:
    """Reads the lines of a /proc or /sys file; an empty list if it is missing or unreadable."""
    try:
        return file.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    except OSError:
        return []


def read_number(file: Path) -> int | None:
    """Reads the integer in a file; None for "max" (no limit) or anything else."""
    text = "".join(read_lines(file)).strip()
    return int(text) if text.isdecimal() else None
