# SPDX-License-Identifier: Apache-2.0
"""Quantisation of a float checkpoint to a new one; see `python -m executor.quantize --help`."""
