# SPDX-License-Identifier: Apache-2.0
"""docs/npu.md, its Chinese twin, the Dockerfile and requirements.txt say the same, and what the code says."""

import re

import pytest

from executor.config import REPOSITORY
from executor.doctor.host import ASSUMED, CANN_OF, GRAPH_HDK, HDK_OF
from executor.utils.hccl_ports import FIRST_PORT, NUM_PORTS
from tests.docs.test_docs import code_blocks, outline
from tests.npu.wheels import VERSIONS

ENGLISH, CHINESE = ((REPOSITORY / "docs" / name).read_text(encoding="utf-8") for name in ("npu.md", "npu.zh.md"))
DOCKERFILE = (REPOSITORY / "docker" / "Dockerfile.npu").read_text(encoding="utf-8")
SAME = ("headings", "code", "blocks", "figures")  # parts of an outline that do not depend on the language


def shared_outline(text: str) -> dict[str, list]:
    found = outline(text)
    return {part: found[part] for part in SAME} | {"all blocks": re.findall(r"^```.*?^```", text, re.M | re.S)}


def test_the_languages_have_the_same_outline():
    english, chinese = shared_outline(ENGLISH), shared_outline(CHINESE)
    assert english == chinese
    assert all(english.values())


@pytest.mark.parametrize(
    ("part", "written", "instead"),
    [
        ("headings", "## Two nodes", "### Two nodes"),
        ("blocks", "--ranks 16", "--ranks 8"),
        ("all blocks", "graph = max", "eager = max"),
        ("code", "`qwen3_235b_16tp`", "`qwen3_235b_1tp_16ep`"),
        ("figures", "|2.12.0|2.12.0|9.1|", "|2.12.0|2.12.0|9.0|"),
    ],
)
def test_a_difference_of_the_languages_is_detected(part, written, instead):
    assert written in ENGLISH
    assert shared_outline(ENGLISH.replace(written, instead))[part] != shared_outline(ENGLISH)[part]


# Versions


def pairs(text: str) -> list[list[str]]:
    """Rows of the table of versions: torch, torch_npu, CANN, state."""
    table = text.partition("|torch|torch_npu|CANN|")[2].partition("\n\n")[0]
    return [row.strip("|").split("|") for row in table.splitlines()[2:]]


def test_the_versions_are_the_doctors():
    rows = pairs(ENGLISH)
    assert {torch_npu: cann.removesuffix(" *") for _, torch_npu, cann, _ in rows} == CANN_OF
    assert {torch_npu for _, torch_npu, cann, _ in rows if cann.endswith(" *")} == set(ASSUMED)
    assert all(torch_npu.split(".post")[0] == torch for torch, torch_npu, *_ in rows)
    assert {torch_npu for _, torch_npu, _, state in rows if state.startswith("checked")} == set(VERSIONS)


def test_the_minimum_versions_are_the_doctors():
    need = re.search(r"Ascend HDK (\S+) \((\S+) for CANN 9\.0; graph mode (\S+)\)", ENGLISH)
    assert need.groups() == (HDK_OF["9.1"], HDK_OF["9.0"], GRAPH_HDK)


def test_the_reserved_ports_are_hccls():
    assert re.search(r"ip_local_reserved_ports=(\S+)", ENGLISH)[1] == f"{FIRST_PORT}-{FIRST_PORT + NUM_PORTS - 1}"


# The image


def instructions(text: str) -> list[tuple[str, str]]:
    """Name and argument of each instruction, continued lines joined, with the defaults of ARGs put in."""
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#")).replace("\\\n", " ")
    arguments, found = {}, []
    for line in filter(None, map(str.strip, lines.splitlines())):
        name, _, rest = line.partition(" ")
        rest = re.sub(r"\$\{(\w+)\}", lambda match: arguments[match[1]], rest)
        if name == "ARG":
            key, _, arguments[key] = rest.partition("=")
        found.append((name, " ".join(rest.split())))
    return found


def pip_arguments(command: str) -> list[str]:
    """What is given to `pip install`, without its options, but with -r FILE."""
    words = command.partition(" pip install ")[2].replace('"', "").replace("'", "").split()
    for option in ("--index-url",):
        if option in words:
            del words[words.index(option) : words.index(option) + 2]
    return [word for word in words if not word.startswith("--")]


def installs(text: str) -> list[list[str]]:
    runs = [argument for name, argument in instructions(text) if name == "RUN"]
    return [pip_arguments(part) for run in runs for part in run.split(" && ") if " pip install " in part]


def test_the_image_installs_what_the_table_says():
    [(torch, torch_npu, cann, _)] = [row for row in pairs(ENGLISH) if row[3].endswith("in the image")]
    assert installs(DOCKERFILE) == [[f"torch=={torch}"], [f"torch-npu=={torch_npu}", "-r", "/tmp/requirements.txt"]]
    found = instructions(DOCKERFILE)
    names = [name for name, _ in found]
    assert names == ["ARG", "ARG", "FROM", "ARG", "ARG", "ARG", "ARG", "RUN", "COPY", "RUN", "WORKDIR", "CMD"]
    image = dict(found)["FROM"]
    assert re.fullmatch(rf"quay\.io/ascend/cann:{re.escape(cann)}\.\d+-a3-ubuntu22\.04-py3\.12", image)
    assert dict(found)["COPY"] == "requirements.txt /tmp/requirements.txt"
    assert dict(found)["WORKDIR"] == "/workspace" and ":/workspace " in ENGLISH  # where the repository is mounted
    [torch_run] = [argument for name, argument in found if name == "RUN" and "torch==" in argument]
    assert torch_run.startswith("sed -i '/^torch/d' /tmp/requirements.txt && ")  # whose torch may be older
    assert '--index-url "https://download.pytorch.org/whl/cpu" "torch==' in torch_run


def test_the_build_argument_of_a2_exists():
    name, value = re.search(r"--build-arg (\w+)=(\w+)", ENGLISH).groups()
    assert f"ARG {name}=" in DOCKERFILE and value == "910b"


def test_without_a_container_the_same_is_installed():
    lines = [line for block in code_blocks(ENGLISH, "bash") for line in block.splitlines() if " pip install " in line]
    [torch], [torch_npu, *others] = map(pip_arguments, lines)
    assert [[torch], [torch_npu, "-r", "/tmp/requirements.txt"]] == installs(DOCKERFILE)
    required = (REPOSITORY / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert others == [line for line in required if not line.startswith(("#", "torch"))]
    assert "--index-url https://download.pytorch.org/whl/cpu" in lines[0]


def test_another_image_is_detected():
    changed = DOCKERFILE.replace("TORCH_NPU_VERSION=2.12.0", "TORCH_NPU_VERSION=2.13.0")
    assert installs(changed) != installs(DOCKERFILE)
    assert installs(DOCKERFILE.replace(" -r /tmp/requirements.txt", "")) != installs(DOCKERFILE)
