# SPDX-License-Identifier: Apache-2.0
"""Benchmarks, one module per command: `python -m executor.bench COMMAND`."""
