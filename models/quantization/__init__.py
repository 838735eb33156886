# SPDX-License-Identifier: Apache-2.0
"""Number formats of checkpoints: which one a module has, and how its stored tensors become a Weight."""
