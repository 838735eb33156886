# SPDX-License-Identifier: Apache-2.0
"""The documentation says what the code does: settings, files, commands."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest

from executor import config

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGURATION = REPOSITORY / "docs" / "configuration.md"
READMES = [REPOSITORY / "README.md", REPOSITORY / "README.zh.md"]
PAGES = [*READMES, *sorted((REPOSITORY / "docs").rglob("*.md")), REPOSITORY / "dataset" / "LongBench" / "README.md"]

TOP_LEVEL = "Top level"
FILE_SUFFIXES = "json jsonl md py sh toml txt yaml zip".split()
NOT_IN_THE_REPOSITORY = [  # what a checkpoint, a data set or a run brings, and names that are no files
    "config.json",
    "generation_config.json",
    "result.jsonl",
    "log_0.log",
    "data.zip",
    "data/gov_report.jsonl",
    "LongBench.py",
    "zai-org/LongBench",
    "/dev/davinci[0-9]*",
    "/",
]


# Settings


def settings_in_code() -> dict[str, tuple[str, object]]:
    """Full key -> its type as written in executor/config.py, and its default (REQUIRED if it has none)."""
    source = Path(config.__file__).read_text(encoding="utf-8")
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    found = {}
    for prefix, kind in {"": config.Settings, **{f"{name}.": kind for name, kind in config.SECTIONS.items()}}.items():
        annotations = {
            node.target.id: ast.get_source_segment(source, node.annotation)
            for node in classes[kind.__name__].body
            if isinstance(node, ast.AnnAssign)
        }
        for definition in dataclasses.fields(kind):
            if prefix or definition.name not in config.SECTIONS:
                found[prefix + definition.name] = annotations[definition.name], default_of(definition)
    return found


def default_of(definition: dataclasses.Field) -> object:
    if definition.default is not dataclasses.MISSING:
        return definition.default
    return "required" if definition.default_factory is dataclasses.MISSING else definition.default_factory()


def settings_in_page(text: str) -> dict[str, tuple[str, object]]:
    """The same, from the tables below the headings that name a section."""
    found = {}
    for part in re.split(r"^## ", text, flags=re.MULTILINE):
        heading, _, body = part.partition("\n")
        if heading not in (TOP_LEVEL, *config.SECTIONS):
            continue
        prefix = "" if heading == TOP_LEVEL else f"{heading}."
        for row in re.findall(r"^\|(.+)\|$", body, flags=re.MULTILINE):
            cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", row)]
            if not cells[0].startswith("`"):
                continue  # the table's head
            key, kind, default, meaning = cells
            assert meaning, f"{key} has no meaning"
            assert prefix + key.strip("`") not in found, f"{key} stands twice"
            value = default if default == "required" else ast.literal_eval(default.strip("`"))
            found[prefix + key.strip("`")] = kind.strip("`"), value
    return found


def test_every_setting_is_documented():
    assert settings_in_page(CONFIGURATION.read_text(encoding="utf-8")) == settings_in_code()


@pytest.mark.parametrize(
    ("written", "instead"),
    [
        ("| `input_max_len` |", "| `max_input_len` |"),
        ('| `Literal["cut", "refuse"]` |', "| `str` |"),
        ("| `4080` |", "| `4096` |"),
        ("| `int \\| None` |", "| `int` |"),
        ("## parallel_config", "## Parallelism"),
    ],
)
def test_a_wrong_table_is_noticed(written, instead):
    text = CONFIGURATION.read_text(encoding="utf-8")
    assert written in text
    assert settings_in_page(text.replace(written, instead)) != settings_in_code()


# Links and files


def missing_targets(page: Path, text: str) -> list[str]:
    """Relative links to files or headings that are not there, and files named in backticks that are not there."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    missing = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if re.match(r"[a-z]+:", link):
            continue
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            missing.append(link)
    for name in re.findall(r"`([^`\n]+)`", prose):
        if is_file_name(name) and not (REPOSITORY / name).exists() and not (config_folder() / name).exists():
            missing.append(name)
    return missing


def is_file_name(name: str) -> bool:
    """Whether inline code names a file or folder that the repository should have."""
    if name in NOT_IN_THE_REPOSITORY or not re.fullmatch(r"[\w./-]+", name):
        return False
    stem, _, suffix = name.rpartition(".")
    return "/" in name or (stem != "" and suffix in FILE_SUFFIXES)


def config_folder() -> Path:
    """YAML files may be named without their folder, as `--yaml` takes them."""
    return REPOSITORY / "models" / "qwen3_moe" / "config"


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_and_files_exist(page):
    assert missing_targets(page, page.read_text(encoding="utf-8")) == []


def test_missing_targets_are_noticed():
    text = "[a](docs/configuration.md#yarn) [b](docs/configuration.md#yam) [c](docs/nothing.md) `ops/nothing.py` `x.py`"
    assert missing_targets(READMES[0], text) == [
        "docs/configuration.md#yam",
        "docs/nothing.md",
        "ops/nothing.py",
        "x.py",
    ]


# Commands


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("language", ["bash", "python"])
def test_readmes_show_the_same(language):
    english, chinese = (code_blocks(page.read_text(encoding="utf-8"), language) for page in READMES)
    assert english and english == chinese


def files_in_commands(text: str) -> list[str]:
    """Scripts, modules, requirement files and YAML names that the commands of a page use, as paths."""
    commands = "\n".join([*code_blocks(text, "bash"), *re.findall(r"`([^`\n]+)`", text)])
    modules = [module for module in re.findall(r"python -m ([\w.]+)", commands) if module != "pip"]
    yamls = [name for name in re.findall(r"--yaml (\w[\w./-]*)", commands) if name != "NAME"]
    return [
        *re.findall(r"bash ([\w./-]+\.sh)", commands),
        *re.findall(r"-r ([\w./-]+)", commands),
        *(file_of_module(module) for module in modules),
        *(f"models/qwen3_moe/config/{name}.yaml" for name in yamls),
    ]


def file_of_module(module: str) -> str:
    path = module.replace(".", "/")
    return f"{path}/__main__.py" if (REPOSITORY / path).is_dir() else f"{path}.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_commands_name_files_that_exist(page):
    files = files_in_commands(page.read_text(encoding="utf-8"))
    assert [file for file in files if not (REPOSITORY / file).is_file()] == []


def overrides_in(text: str) -> list[str]:
    return re.findall(r"--set ['\"]?([\w.]+=[^\s'\"]+)", "\n".join(code_blocks(text, "bash")))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_commands_name_settings_that_exist(page):
    for override in overrides_in(page.read_text(encoding="utf-8")):
        raw = {"model_name": "x", "model_path": "x"}
        config.apply_override(raw, override)
        config.settings_from_dict(raw, str(page))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_yaml_examples_are_valid(page):
    for number, block in enumerate(code_blocks(page.read_text(encoding="utf-8"), "yaml"), 1):
        raw = {"model_name": "x", "model_path": "x", **config.parse_yaml(block)}
        config.settings_from_dict(raw, f"{page}: example {number}")
