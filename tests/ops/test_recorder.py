# SPDX-License-Identifier: Apache-2.0
"""Tests that captured graphs are freed at process exit."""

import weakref

from ops.recorder import release


class Graph:
    def __init__(self, error: Exception | None = None):
        self.error = error
        self.resets = 0

    def reset(self) -> None:
        self.resets += 1
        if self.error:
            raise self.error


def test_living_graphs_are_freed():
    graph = Graph()
    release(weakref.ref(graph))
    assert graph.resets == 1


def test_graphs_that_are_gone_or_whose_device_failed_are_let_be():
    gone = weakref.ref(Graph())
    assert gone() is None
    release(gone)
    failing = Graph(RuntimeError("CUDA error"))
    release(weakref.ref(failing))
    assert failing.resets == 1
