# SPDX-License-Identifier: Apache-2.0
"""The tests that docs/reliability.md names exist."""

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
PAGE = TESTS.parent / "docs/reliability.md"


def missing(page: str) -> list[str]:
    """The test files and functions a page names that are not there."""
    names = set(re.findall(r"\btest_\w+", page)) - set(re.findall(r"\b(test_\w+)\.py", page))
    files = set(re.findall(r"\btest_\w+\.py", page))
    code = {file.name: file.read_text(encoding="utf-8") for file in TESTS.rglob("test_*.py")}
    defined = set(re.findall(r"^def (test_\w+)", "\n".join(code.values()), re.MULTILINE))
    return sorted((files - set(code)) | (names - defined))


def test_the_tests_it_names_exist():
    page = PAGE.read_text(encoding="utf-8")
    assert missing(page) == [] and page.count("::test_") > 20


def test_a_test_that_is_gone_is_noticed():
    assert missing("`test_infer.py::test_no_such_thing`, `test_none.py`") == ["test_no_such_thing", "test_none.py"]
