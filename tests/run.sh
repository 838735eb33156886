#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs ruff (where installed) and the tests: bash tests/run.sh [pytest arguments]. Paths are relative to the repository.
# PYTHON names the Python to use (default: python, or python3 where there is no python).
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="${PYTHON:-python}"
[[ -n "${PYTHON:-}" ]] || command -v python >/dev/null || python=python3

ruff_status=0
if "$python" -c 'import ruff' 2>/dev/null; then
    "$python" -m ruff check --quiet . || ruff_status=$?
fi

pytest_status=0
"$python" -m pytest "$@" || pytest_status=$?
if ((ruff_status != 0)); then
    echo "ruff check failed: its findings are above the tests" >&2
fi
exit $((pytest_status != 0 ? pytest_status : ruff_status))
