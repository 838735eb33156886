# SPDX-License-Identifier: Apache-2.0
"""Machine check: versions, settings, and each operation of a backend compared with the reference."""
