# SPDX-License-Identifier: Apache-2.0
"""The checks run in a process of their own, with the wheel that NPU_WHEEL names emulated."""

import os

import pytest
import torch

from tests.npu.emulator import install, set_product


@pytest.fixture(autouse=True, scope="session")
def emulated():
    torch.set_num_threads(1)  # a forked process would deadlock on its parent's thread pool
    install(os.environ["NPU_WHEEL"])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    set_product("A3")
