# SPDX-License-Identifier: Apache-2.0
"""Modes of HCCL communicators: where their algorithms run, chosen by product and super-node.

Source: HCCL's pages of HCCL_OP_EXPANSION_MODE, HCCL_EXEC_TIMEOUT and HCCL_LOGIC_SUPERPOD_ID, torch_npu's of pg_options.
A2 runs inference in its default mode. On A3 the vector cores (AIV) are faster for small messages, but slower for an
all-to-all of more than 1 MB between two ranks, and they serve one communicator at a time, within a super-node.
"""

import logging
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch_npu

from ops.ascend import product_of
from ops.comm import gather_texts

logger = logging.getLogger(__name__)

MODE_VARIABLE = "HCCL_OP_EXPANSION_MODE"
TIMEOUT_VARIABLE = "HCCL_EXEC_TIMEOUT"
SUPER_NODE_VARIABLE = "HCCL_LOGIC_SUPERPOD_ID"
AIV = 3  # of the option hccl_op_expansion_mode
MAX_AIV_TIMEOUT_S = 1091


@cache
def super_nodes() -> list[str]:
    """HCCL_LOGIC_SUPERPOD_ID of every rank, "" where it is not set. Collective, at the first call."""
    return gather_texts(SUPER_NODE_VARIABLE, os.environ.get(SUPER_NODE_VARIABLE, ""))


def group_options() -> Callable[[tuple[int, ...], bool], Any]:
    """Returns a function of a group's ranks and whether no all-to-all runs on it, which makes the group's options.

    None stands for HCCL's defaults, as everywhere if the user has set HCCL_OP_EXPANSION_MODE. Collective.
    """
    given, product = os.environ.get(MODE_VARIABLE), product_of(torch_npu.npu.get_device_name())
    where = super_nodes()
    if given is not None:
        logger.info("HCCL: %s=%s, as the environment says, for all groups", MODE_VARIABLE, given)
    elif product == "A3":
        logger.info("HCCL: mode AIV within attn_tp groups, the default elsewhere")
    uses_aiv = product == "A3" if given is None else given == "AIV"
    check_timeout(os.environ.get(TIMEOUT_VARIABLE), uses_aiv)

    def options(ranks: tuple[int, ...], has_no_all_to_all: bool) -> Any:
        in_one_super_node = len({where[rank] for rank in ranks}) == 1
        if given is not None or not (product == "A3" and has_no_all_to_all and in_one_super_node):
            return None
        made = torch_npu._C._distributed_c10d.ProcessGroupHCCL.Options()
        made.hccl_config = {"hccl_op_expansion_mode": AIV}
        return made

    return options


def check_timeout(given_s: str | None, uses_aiv: bool) -> None:
    """Warns of a timeout that HCCL does not apply."""
    if uses_aiv and given_s is not None and given_s.isdecimal() and int(given_s) > MAX_AIV_TIMEOUT_S:
        logger.warning(
            "%s: %s s, but in mode AIV at most %d s apply; set %s=AI_CPU for a longer timeout",
            TIMEOUT_VARIABLE,
            given_s,
            MAX_AIV_TIMEOUT_S,
            MODE_VARIABLE,
        )
