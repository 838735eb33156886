# SPDX-License-Identifier: Apache-2.0
"""Process set-up and failure reporting of a rank started by the launcher; no effect without one."""

import contextlib
import ctypes
import json
import logging
import os
import signal
import time
from pathlib import Path

from executor.launch.interrupts import Interrupted
from executor.launch.terminal import drain, print_error
from executor.utils.text import one_line, quoted

logger = logging.getLogger(__name__)

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
ERROR_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"  # set by torchrun, which reads the file when the rank has exited
LAUNCHER_VARIABLE = "LAUNCHER_PID"
PR_SET_PDEATHSIG = 1
CONSEQUENCE_DELAY_S = 2.0
DRAIN_S = 5.0  # time for a stalled reader before a failed rank exits anyway


def set_up_rank() -> int:
    """Ties the process lifetime to the launcher's and sets CPU affinity; returns the rank.

    Call before importing torch, which sizes its thread pool by the affinity.
    """
    rank, world_size = rank_among("RANK", "WORLD_SIZE")
    local_rank, local_size = rank_among("LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if world_size == 1:
        return rank
    logging.captureWarnings(True)  # warnings go to the rank's log file
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's handler would run only after a collective
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.environ.get(LAUNCHER_VARIABLE, str(os.getppid())) != str(os.getppid()):
        os._exit(1)  # the launcher died before prctl
    os.sched_setaffinity(0, share_of_cores(sorted(os.sched_getaffinity(0), key=cpu_topology), local_rank, local_size))
    return rank


def rank_among(rank_variable: str, size_variable: str) -> tuple[int, int]:
    """Reads a rank and the number of ranks from the environment. ValueError for anything a launcher cannot have set."""
    values = []
    for name, default in ((rank_variable, "0"), (size_variable, "1")):
        text = os.environ.get(name, default)
        if not (text.isascii() and text.isdecimal() and len(text) < 10):
            raise ValueError(f"{name}: {quoted(text)} is not a whole number")
        values.append(int(text))
    rank, size = values
    known = size_variable in os.environ
    if size < 1 or (rank >= size and (known or size_variable == "WORLD_SIZE")):  # LOCAL_WORLD_SIZE may be unset
        state = f"is {size}" if known else "is not set (one rank)"
        raise ValueError(f"{rank_variable}: {rank} must be below {size_variable}, which {state}")
    return rank, size


def forget_rank() -> None:
    """Clears the rank environment variables, which some platforms set for every process."""
    for name in RANK_VARIABLES:
        os.environ.pop(name, None)


def share_of_cores(cores: list[int], index: int, parts: int) -> list[int]:
    """Contiguous part `index` of `parts` equal ones of `cores`; all cores if there are fewer than parts."""
    if len(cores) < parts:
        return cores
    return cores[index * len(cores) // parts : (index + 1) * len(cores) // parts]


def cpu_topology(cpu: int) -> tuple[int, int, int]:
    """Sort key (socket, core, CPU number) of a logical CPU, which keeps the hyperthreads of a core adjacent."""
    topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
    try:
        return int((topology / "physical_package_id").read_text()), int((topology / "core_id").read_text()), cpu
    except OSError:
        return 0, cpu, cpu


def fail(exit_code: int, error: BaseException) -> int:
    """Reports why this rank exits, to the user or the launcher; returns the exit code.

    exit_code: 2 for wrong input, else 1, with the traceback in the log.
    """
    first_line = (str(error).splitlines() or [""])[0]
    expected = exit_code == 2 or isinstance(error, Interrupted | PartialFailure)
    message = one_line(first_line if expected else f"{type(error).__name__}: {first_line}")
    consequence = is_consequence(error)
    if consequence:
        logger.error("a collective with other ranks failed: %s", message)
    elif not expected:
        logger.error("this rank failed", exc_info=error)
    if ERROR_FILE_VARIABLE not in os.environ:
        print_error(message if expected else f"rank {os.environ.get('RANK', '0')}: {message}")
        return exit_code
    if consequence:  # let the rank that caused it exit first
        time.sleep(CONSEQUENCE_DELAY_S)
    report = {"message": message, "timestamp": int(time.time()), "exit_code": exit_code, "is_consequence": consequence}
    with contextlib.suppress(FileNotFoundError):  # the launcher has already exited and removed the folder
        Path(os.environ[ERROR_FILE_VARIABLE]).write_text(json.dumps(report), encoding="utf-8")
    drain(DRAIN_S)
    os._exit(exit_code)  # a regular exit would wait for the other ranks


class PartialFailure(Exception):
    """Raised when the run completed, but some prompts or outputs failed."""


def is_consequence(error: BaseException) -> bool:
    """Returns whether the error came from a collective: then usually another rank failed first."""
    frame = error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_globals.get("__name__", "").startswith("torch.distributed"):
            return True
        frame = frame.tb_next
    return type(error).__module__.startswith("torch.distributed")
