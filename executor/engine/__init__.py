# SPDX-License-Identifier: Apache-2.0
"""Request scheduling, paged KV cache, model steps and sampling."""
