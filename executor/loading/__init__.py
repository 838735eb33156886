# SPDX-License-Identifier: Apache-2.0
"""Checks before loading, checkpoint, memory, tokenizer."""
