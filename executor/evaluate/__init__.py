# SPDX-License-Identifier: Apache-2.0
"""Quality of a checkpoint's predictions on given text; see `python -m executor.evaluate --help`."""
