# SPDX-License-Identifier: Apache-2.0
"""What is on this machine, and whether a backend's operations give there what the reference gives."""
