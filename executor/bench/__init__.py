# SPDX-License-Identifier: Apache-2.0
"""Tools that measure speed, one module a command: `python -m executor.bench COMMAND`."""
