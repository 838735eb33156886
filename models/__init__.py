# SPDX-License-Identifier: Apache-2.0
import models.transformers_internals  # noqa: F401 (before any other import of transformers' config class)
