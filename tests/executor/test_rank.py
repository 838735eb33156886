# SPDX-License-Identifier: Apache-2.0
"""The environment that says which rank a process is."""

import pytest

from executor.launch.rank import RANK_VARIABLES, set_up_rank


@pytest.fixture(autouse=True)
def no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "value", ["", "x", "-1", " 1", "1.0", "²", "٣", "9" * 5000, "x" * 5000, "\x1b[31m", "0x1", "1_0"]
)
@pytest.mark.parametrize("name", RANK_VARIABLES)
def test_a_value_that_is_no_whole_number_is_refused_by_its_name(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError) as raised:
        set_up_rank()
    line = str(raised.value)
    assert line.startswith(f"{name}: ") and line.isprintable() and len(line) < 200


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "1"},
        {"RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
        {"RANK": "1", "WORLD_SIZE": "1"},
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"WORLD_SIZE": "0"},
        {"LOCAL_WORLD_SIZE": "0"},
        {"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "2"},
    ],
)
def test_a_rank_beyond_its_group_is_refused(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    state = r"(is \d|is not set \(one rank\))$"
    with pytest.raises(ValueError, match=f"RANK: . must be below (LOCAL_)?WORLD_SIZE, which {state}"):
        set_up_rank()


@pytest.mark.parametrize("environment", [{}, {"RANK": "0"}, {"LOCAL_RANK": "1"}, {"LOCAL_WORLD_SIZE": "4"}])
def test_one_process_needs_no_environment(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert set_up_rank() == 0
