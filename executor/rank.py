# SPDX-License-Identifier: Apache-2.0
"""What a rank does for the launcher that started it. A process without one does nothing here."""

import contextlib
import ctypes
import json
import logging
import os
import signal
import time
from pathlib import Path

from executor.interrupts import Interrupted
from executor.terminal import drain, print_error
from executor.utils.text import one_line

logger = logging.getLogger(__name__)

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
ERROR_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"  # set by torchrun, which reads the file when the rank has ended
LAUNCHER_VARIABLE = "LAUNCHER_PID"
PR_SET_PDEATHSIG = 1
CONSEQUENCE_DELAY_S = 2.0
DRAIN_S = 5.0  # what a reader that pauses gets before a failed rank ends all the same


def join() -> int:
    """Binds this process to its launcher's life and to its share of the cores; returns its rank.

    To be called before torch is imported, which sizes its threads by the cores it finds.
    """
    if not os.environ.get("RANK", "0").isdecimal():
        raise ValueError(f"RANK: {os.environ['RANK']!r} is not a whole number")
    rank = int(os.environ.get("RANK", "0"))
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return rank
    logging.captureWarnings(True)  # to the rank's log, not from all of them to the terminal
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own handler waits for the end of a collective
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.environ.get(LAUNCHER_VARIABLE, str(os.getppid())) != str(os.getppid()):
        os._exit(1)  # the launcher died before prctl
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    os.sched_setaffinity(0, share_of_cores(sorted(os.sched_getaffinity(0), key=place), local_rank, local_size))
    return rank


def forget_rank() -> None:
    """Removes what says which rank this process is: some platforms set it for every process."""
    for name in RANK_VARIABLES:
        os.environ.pop(name, None)


def share_of_cores(cores: list[int], index: int, parts: int) -> list[int]:
    """Part `index` of `parts`; all of them if there are fewer cores than parts."""
    if len(cores) < parts:
        return cores
    return cores[index * len(cores) // parts : (index + 1) * len(cores) // parts]


def place(cpu: int) -> tuple[int, int, int]:
    """Socket, core and number of a logical CPU: sorted by it, those of a core and of a socket are neighbours."""
    topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
    try:
        return int((topology / "physical_package_id").read_text()), int((topology / "core_id").read_text()), cpu
    except OSError:
        return 0, cpu, cpu


def fail(exit_code: int, error: BaseException) -> int:
    """Tells the user, or the launcher if there is one, why this rank ends; returns the exit code.

    exit_code: 2 for what the user has to change, else 1, for which the traceback is logged.
    """
    first_line = (str(error).splitlines() or [""])[0]
    expected = exit_code == 2 or isinstance(error, Interrupted | PartialFailure)
    message = one_line(first_line if expected else f"{type(error).__name__}: {first_line}")
    consequence = is_consequence(error)
    if consequence:
        logger.error("an exchange with other ranks failed: %s", message)
    elif not expected:
        logger.error("this rank failed", exc_info=error)
    if ERROR_FILE_VARIABLE not in os.environ:
        print_error(message if expected else f"rank {os.environ.get('RANK', '0')}: {message}")
        return exit_code
    if consequence:  # the rank that caused it is to end first
        time.sleep(CONSEQUENCE_DELAY_S)
    report = {"message": message, "timestamp": int(time.time()), "exit_code": exit_code, "is_consequence": consequence}
    with contextlib.suppress(FileNotFoundError):  # its folder is gone when the launcher has said why and ended
        Path(os.environ[ERROR_FILE_VARIABLE]).write_text(json.dumps(report), encoding="utf-8")
    drain(DRAIN_S)
    os._exit(exit_code)  # the regular way would wait for the other ranks


class PartialFailure(Exception):
    """The run has ended, but not all of it went well."""


def is_consequence(error: BaseException) -> bool:
    """Whether an exchange between ranks failed: as a rule because another rank has."""
    frame = error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_globals.get("__name__", "").startswith("torch.distributed"):
            return True
        frame = frame.tb_next
    return type(error).__module__.startswith("torch.distributed")
