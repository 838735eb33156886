# SPDX-License-Identifier: Apache-2.0
"""Fixture: the valid checkpoint that cases modify."""

from pathlib import Path

import pytest

from tests.hostile.case import make_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("hostile") / "base")
