# SPDX-License-Identifier: Apache-2.0
"""Launcher of a job's ranks, and the process set-up of every command."""
