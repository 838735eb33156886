# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.npu.fake_runtime COMMAND ...`: runs a command where torch finds the fake NPU."""

import os
import sys

from tests.npu.fake_runtime import Unavailable, fake_npu

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    try:
        environment = fake_npu()
    except Unavailable as reason:
        sys.exit(f"error: {reason}")
    os.execvpe(sys.argv[1], sys.argv[1:], environment)
