# SPDX-License-Identifier: Apache-2.0
"""Command line: `python -m executor.launch` with the arguments of executor.infer starts this node's ranks."""

import sys

from executor.launch.launcher import main

if __name__ == "__main__":
    sys.exit(main())
