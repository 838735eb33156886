# SPDX-License-Identifier: Apache-2.0
"""Tests algorithm selection and HCCL buffer sizes of fused dispatch on Atlas products."""

import pytest

from ops.ascend import ALGORITHMS, MIB, ExchangeSizes, buffer_setting, choose_algorithms, product_of

SHAPES = {"30b": {"hidden_size": 2048}, "235b": {"hidden_size": 4096}}
BY_NAME = {algorithm.name: algorithm for algorithms in ALGORITHMS.values() for algorithm in algorithms}
# algorithm, shape, ranks; MB for 1, 8, 32, 64, 128, 256 tokens per rank; most tokens in HCCL's default of 200 MB
BUFFERS = [
    ("fullmesh_v1", "30b", (8, 16, 128), (1.2, 9.5, 38, 76, 152, 304), 168),
    ("fullmesh_v1", "235b", (8, 16, 128), (2.2, 18, 72, 144, 288, 576), 88),
    ("fullmesh_v2", "235b", (8, 16, 128), (2.4, 19, 76, 152, 304, 608), 84),
    ("fullmesh", "30b", (8,), (4.5, 8, 20, 36, 68, 132), 392),
    ("fullmesh", "235b", (8,), (5, 12, 36, 68, 132, 260), 196),
    ("fullmesh", "30b", (16, 32, 64, 128), (5, 12, 36, 68, 132, 260), 196),
    ("fullmesh", "235b", (16, 32, 64, 128), (6, 20, 68, 132, 260, 516), 98),
]


def sizes_of(shape: str = "30b", ranks: int = 8, tokens: int = 8, **changed: int) -> ExchangeSizes:
    sizes = {"ranks": ranks, "tokens": tokens, "experts": 128, "top_k": 8, **SHAPES[shape]}
    return ExchangeSizes(**(sizes | changed))


@pytest.mark.parametrize(("name", "shape", "ranks", "megabytes", "most"), BUFFERS)
def test_buffer(name, shape, ranks, megabytes, most):
    algorithm = BY_NAME[name]
    for count in ranks:
        for tokens, expected in zip((1, 8, 32, 64, 128, 256), megabytes, strict=True):
            found = algorithm.buffer_bytes(sizes_of(shape, count, tokens)) / MIB
            assert found == pytest.approx(expected, abs=0.051 if expected < 10 else 0.5)
        assert algorithm.buffer_bytes(sizes_of(shape, count, most)) <= 200 * MIB
        assert algorithm.buffer_bytes(sizes_of(shape, count, most + 1)) > 200 * MIB


def test_buffer_of_the_hierarchy():
    """experts * tokens * (2 * hidden + 16 * 8 bytes), and 404 MB."""
    assert BY_NAME["hierarchy"].buffer_bytes(sizes_of("235b", 16, 256)) == 128 * 256 * (8192 + 128) + 404 * MIB


def test_buffer_setting():
    fullmesh_v2, fullmesh_v1 = BY_NAME["fullmesh_v2"], BY_NAME["fullmesh_v1"]
    both, sizes = (fullmesh_v2, fullmesh_v1), sizes_of("235b", 16, 128)
    assert buffer_setting(both, sizes, None) == "315"  # 304 and a margin of 11
    assert buffer_setting(both, sizes_of(), None) == "200"
    assert buffer_setting(both, sizes, "304") == "304" and buffer_setting(both, sizes, "512") == "512"
    assert buffer_setting((fullmesh_v1,), sizes, "288") == "288"
    for given in ("303", "much", "-1"):
        with pytest.raises(ValueError, match=f"^HCCL_BUFFSIZE: {given} MB given, .* need 304 MB") as raised:
            buffer_setting(both, sizes, given)
        assert "\n" not in str(raised.value)


def test_product():
    names = ("Ascend910B3", "Ascend910B4-1", "Ascend910_9391", "Ascend910_9362", "Ascend310P3", "Ascend910A")
    assert [product_of(name) for name in names] == ["A2", "A2", "A3", "A3", None, None]


@pytest.mark.parametrize(
    ("product", "changed", "expected"),
    [
        ("A3", {}, ["fullmesh_v2", "fullmesh_v1"]),
        ("A3", {"tokens": 256}, ["fullmesh_v2", "fullmesh_v1"]),
        ("A3", {"tokens": 257}, ["fullmesh_v1"]),
        ("A3", {"top_k": 13}, ["fullmesh_v1"]),
        ("A3", {"hidden_size": 1024}, ["fullmesh_v2", "fullmesh_v1"]),
        ("A3", {"ranks": 24, "experts": 120}, ["fullmesh_v2", "fullmesh_v1"]),
        ("A3", {"ranks": 32, "spans_super_nodes": True}, ["hierarchy"]),
        ("A3", {"ranks": 32, "top_k": 16, "tokens": 256, "spans_super_nodes": True}, ["hierarchy"]),
        ("A2", {}, ["fullmesh"]),
        ("A2", {"ranks": 16}, ["fullmesh"]),
        ("A2", {"ranks": 16, "tokens": 256}, ["fullmesh"]),
        ("A2", {"ranks": 128}, ["fullmesh"]),
        ("A2", {"hidden_size": 128}, ["fullmesh"]),
    ],
)
def test_algorithms(product, changed, expected):
    algorithms, why = choose_algorithms(product, sizes_of(**changed))
    assert [algorithm.name for algorithm in algorithms] == expected and why == f"{product} {', '.join(expected)}"


@pytest.mark.parametrize(
    ("product", "changed", "named"),
    [
        ("A3", {"top_k": 17}, "fullmesh_v1 takes at most 16 experts a token, not 17"),
        ("A3", {"tokens": 513}, "fullmesh_v1 takes at most 512 tokens a rank, not 513"),
        ("A3", {"hidden_size": 1023}, "takes hidden sizes of 1024 to 8192 in steps of 1, not 1023"),
        ("A3", {"hidden_size": 8193}, "not 8193"),
        ("A3", {"ranks": 24}, "cannot share 128 experts among 24 ranks"),
        ("A3", {"experts": 1024}, "takes at most 512 experts, not 1024"),
        ("A3", {"spans_super_nodes": True}, "fullmesh_v2 does not span super-nodes"),
        ("A3", {"spans_super_nodes": True}, "hierarchy does not take 8 ranks"),
        ("A3", {"ranks": 24, "experts": 120, "spans_super_nodes": True}, "hierarchy does not take 24 ranks"),
        ("A3", {"ranks": 16, "tokens": 257, "spans_super_nodes": True}, "hierarchy takes at most 256 tokens a rank"),
        (
            "A3",
            {"ranks": 16, "hidden_size": 7200, "spans_super_nodes": True},
            "hierarchy takes hidden sizes of 1024 to",
        ),
        ("A3", {"ranks": 16, "experts": 512, "spans_super_nodes": True}, "hierarchy takes at most 24 experts a rank"),
        ("A3", {"tokens": 513}, "hierarchy is for several super-nodes"),
        ("A2", {"tokens": 257}, "fullmesh takes at most 256 tokens a rank, not 257"),
        ("A2", {"ranks": 10, "experts": 120}, "fullmesh does not take 10 ranks"),
        ("A2", {"hidden_size": 2056}, "in steps of 32, not 2056"),
        ("A2", {"hidden_size": 7200}, "fullmesh takes hidden sizes of 32 to 7168"),
        (None, {}, "unknown product"),
    ],
)
def test_no_algorithm(product, changed, named):
    algorithms, why = choose_algorithms(product, sizes_of(**changed))
    assert not algorithms and named in why and "\n" not in why
