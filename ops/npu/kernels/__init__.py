# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for NPUs; imported only where Triton has an Ascend backend."""
