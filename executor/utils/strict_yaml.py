# SPDX-License-Identifier: Apache-2.0
"""YAML parser with limits on size and depth; rejects duplicate keys."""

from typing import Any

import yaml

from executor.utils.reading import refusing
from executor.utils.text import quoted

MAX_NODES = 10_000  # keys and values, with aliases expanded
MAX_DEPTH = 50


def parse_yaml(text: str) -> Any:
    """Parses one YAML document. ValueError with the line for invalid YAML, exceeded limits, or duplicate keys."""
    with refusing(""):
        try:
            return yaml.load(text, StrictLoader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = f"line {mark.line + 1}: " if mark else ""
            raise ValueError(f"{line}{error.problem or error.context}") from None


class StrictLoader(yaml.SafeLoader):
    """SafeLoader that rejects duplicate keys (PyYAML keeps the last) and reads 1:30 as text, not as 90."""

    def __init__(self, stream: str):
        super().__init__(stream)
        self.num_nodes = 0
        self.depth = 0
        self.expanded: dict[int, tuple[int, int]] = {}  # id of a composed node -> its nodes and depth, expanded

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        is_alias, mark = self.check_event(yaml.AliasEvent), self.peek_event().start_mark
        self.num_nodes += 1
        self.depth += 1
        self._check(mark, self.num_nodes, self.depth)
        node = super().compose_node(parent, index)
        assert node is not None
        self.depth -= 1
        if not is_alias:
            self.expanded[id(node)] = self._measure(node, mark)
        elif id(node) not in self.expanded:
            raise refusal("a recursive alias", mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise refusal("a key is not a scalar", key.start_mark)
            if key.value in seen:
                raise refusal(f"key {quoted(key.value)} is a duplicate, again in line {key.start_mark.line + 1}")
            seen.add(key.value)
        return node

    def _measure(self, node: yaml.Node, mark: yaml.Mark) -> tuple[int, int]:
        if isinstance(node, yaml.ScalarNode):
            return 1, 1
        children = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        sizes = [self.expanded[id(child)] for child in children]
        num_nodes = 1 + sum(size for size, _ in sizes)
        depth = 1 + max((depth for _, depth in sizes), default=0)
        self._check(mark, num_nodes, depth)
        return num_nodes, depth

    def _check(self, mark: yaml.Mark, num_nodes: int, depth: int) -> None:
        if num_nodes > MAX_NODES:
            raise refusal(f"more than {MAX_NODES} keys and values", mark)
        if depth > MAX_DEPTH:
            raise refusal(f"nested more than {MAX_DEPTH} deep", mark)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except Exception:  # raised by PyYAML for a date of month 13, an int of 5,000 digits, !!bool x, !!int ''
            kind = node.tag.rpartition(":")[2]
            raise refusal(f"{quoted(node.value)} is not a valid {kind}", node.start_mark) from None

    def construct_int(self, node: yaml.ScalarNode) -> int | str:
        return node.value if ":" in node.value else self.construct_yaml_int(node)

    def construct_float(self, node: yaml.ScalarNode) -> float | str:
        return node.value if ":" in node.value else self.construct_yaml_float(node)


StrictLoader.add_constructor("tag:yaml.org,2002:int", StrictLoader.construct_int)
StrictLoader.add_constructor("tag:yaml.org,2002:float", StrictLoader.construct_float)


def refusal(problem: str, mark: yaml.Mark | None = None) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
