#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs ruff, mypy (where installed) and the tests: bash tests/run.sh [pytest arguments]. Paths are relative to the
# repository; with arguments, which often are a few tests, types are not checked.
# It takes the Python that infer.sh would take; into a .venv of infer.sh's making it installs the test tools.
# Many tests run on all cores; `-n 4` takes four workers, `-n 0` or `-p no:xdist` runs them one after the other.
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source executor/scripts/function.sh

# Tests run tiny matrices, on which a second thread only waits, and processes side by side.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

choose_python
if [[ "$PYTHON" == "$ROOT/.venv/bin/python" ]]; then
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
fi

ruff_status=0
if "$PYTHON" -c 'import ruff' 2>/dev/null; then
    "$PYTHON" -m ruff check --quiet . || ruff_status=$?
fi
findings='' mypy_status=0
if (($# == 0)) && "$PYTHON" -c 'import mypy' 2>/dev/null; then
    findings="$(mktemp)"
    "$PYTHON" -m mypy --no-error-summary >"$findings" 2>&1 & # a minute, beside the tests
fi

workers=()
if [[ "$*" != *no:xdist* ]] && "$PYTHON" -c 'import xdist' 2>/dev/null; then
    workers=(-n auto --dist loadgroup)
fi
pytest_status=0
"$PYTHON" -m pytest ${workers[@]+"${workers[@]}"} "$@" || pytest_status=$?
if [[ -n "$findings" ]]; then
    wait $! || mypy_status=$?
    cat "$findings" >&2
    rm "$findings"
fi
if ((ruff_status != 0)); then
    echo "ruff check failed: its findings are above the tests" >&2
fi
if ((mypy_status != 0)); then
    echo "mypy failed: its findings are above" >&2
fi
exit $((pytest_status != 0 ? pytest_status : ruff_status != 0 ? ruff_status : mypy_status))
