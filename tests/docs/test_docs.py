# SPDX-License-Identifier: Apache-2.0
"""The documentation matches the code: settings, files, commands, messages."""

import argparse
import ast
import dataclasses
import importlib
import re
import shlex
from pathlib import Path

import pytest

from executor import config
from executor.utils.known_names import hint

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGURATION = REPOSITORY / "docs" / "configuration.md"
READMES = [REPOSITORY / "README.md", REPOSITORY / "README.zh.md"]
PAGES = [*READMES, *sorted((REPOSITORY / "docs").rglob("*.md")), REPOSITORY / "dataset" / "LongBench" / "README.md"]

TOP_LEVEL = "Top level"
FILE_SUFFIXES = "json jsonl md py sh toml txt yaml zip".split()
NOT_IN_THE_REPOSITORY = [  # files of checkpoints, data sets and runs, and names that are not files
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
    """Full key -> (type as written in executor/config.py, default or REQUIRED)."""
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
    """The same, parsed from the page's tables under the headings of the sections."""
    found = {}
    for part in re.split(r"^## ", text, flags=re.MULTILINE):
        heading, _, body = part.partition("\n")
        if heading not in (TOP_LEVEL, *config.SECTIONS):
            continue
        prefix = "" if heading == TOP_LEVEL else f"{heading}."
        for row in re.findall(r"^\|(.+)\|$", body, flags=re.MULTILINE):
            cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", row)]
            if not cells[0].startswith("`"):
                continue  # table header
            key, kind, default, meaning = cells
            assert meaning, f"{key} has no meaning"
            assert prefix + key.strip("`") not in found, f"{key} appears twice"
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
def test_wrong_table_is_detected(written, instead):
    text = CONFIGURATION.read_text(encoding="utf-8")
    assert written in text
    assert settings_in_page(text.replace(written, instead)) != settings_in_code()


# Links and files


def missing_targets(page: Path, text: str) -> list[str]:
    """Relative links to missing files or headings, and missing files named in backticks."""
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
    """Folder of YAML files, which may be named without it, as for `--yaml`."""
    return REPOSITORY / "models" / "qwen3_moe" / "config"


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_and_files_exist(page):
    assert missing_targets(page, page.read_text(encoding="utf-8")) == []


def test_missing_targets_are_detected():
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
    """Paths of scripts, modules, requirement files and YAMLs in the commands of a page."""
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


class Parsed(Exception):
    """Raised after a command line is parsed, instead of running the command."""


def tool_commands(text: str) -> list[list[str]]:
    """Module and arguments of each `python -m executor.` command in a page's code blocks."""
    return [
        shlex.split(line.rpartition("python -m executor.")[2], comments=True)
        for block in code_blocks(text, "bash")
        for line in block.splitlines()
        if "python -m executor." in line
    ]


def is_accepted(words: list[str], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the real parser of a tool takes these arguments."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, *arguments):
        parse_args(parser, *arguments)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    module, command, *arguments = words
    assert module in ("bench", "doctor", "evaluate", "quantize"), f"no test for {module}"
    try:
        if module == "doctor":
            importlib.import_module("executor.doctor.__main__").parse_arguments([command, *arguments])
        elif module == "quantize":
            importlib.import_module("executor.quantize.__main__").parse([command, *arguments])
        else:
            importlib.import_module(f"executor.{module}.{command.replace('-', '_')}").run(arguments)
    except Parsed:
        return True
    except SystemExit:
        return False
    raise AssertionError("the command ran without parsing its arguments")


TOOL_COMMANDS = [
    pytest.param(words, id=f"{page.name}: {' '.join(words)}")
    for page in PAGES
    for words in tool_commands(page.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize("words", TOOL_COMMANDS)
def test_tools_accept_their_documented_arguments(words, monkeypatch):
    assert is_accepted(words, monkeypatch)


@pytest.mark.parametrize("command", ["latency", "throughput", "kernels", "plot"])
def test_readme_shows_each_measurement(command):
    shown = tool_commands(READMES[0].read_text(encoding="utf-8"))
    assert [words[1] for words in shown].count(command) == 1


def test_arguments_of_another_command_are_detected(monkeypatch):
    [latency] = [words for words in tool_commands(READMES[0].read_text(encoding="utf-8")) if words[1] == "latency"]
    for command in ("throughput", "kernels", "plot"):
        with monkeypatch.context() as patch:
            assert not is_accepted(["bench", command, *latency[2:]], patch)


# The two READMEs


def outline(text: str) -> dict[str, list]:
    """Language-independent parts: heading levels, links, inline code, code blocks, numbers in tables."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    rows = re.findall(r"^\|(.+)\|$", prose, flags=re.MULTILINE)
    return {
        "headings": re.findall(r"^#+(?= )", prose, flags=re.MULTILINE),
        "links": [link for link in re.findall(r"\]\(([^)\s]+)\)", prose) if not link.startswith("README")],
        "code": sorted(" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)),
        "blocks": [re.findall(r"^```(\w+)$", text, flags=re.MULTILINE), code_blocks(text, "bash")],
        "figures": [figures(row) for row in rows],
    }


def figures(row: str) -> list[str]:
    return re.findall(r"\d[\d.,]*\d|\d", row)


def test_readmes_have_the_same_outline():
    english, chinese = (outline(page.read_text(encoding="utf-8")) for page in READMES)
    assert english == chinese
    assert all(english.values())


@pytest.mark.parametrize(
    ("part", "written", "instead"),
    [
        ("headings", "## Prompts", "### Prompts"),
        ("links", "(docs/reliability.md)", "(docs/results.md)"),
        ("code", "`OMP_NUM_THREADS`", "`MKL_NUM_THREADS`"),
        ("blocks", "--batch-size 1 8", "--batch-size 1 4"),
        ("figures", "4.95", "4.59"),
    ],
)
def test_difference_of_the_readmes_is_detected(part, written, instead):
    text = READMES[0].read_text(encoding="utf-8")
    assert written in text
    assert outline(text.replace(written, instead))[part] != outline(text)[part]


def test_readme_numbers_equal_the_results():
    results = (REPOSITORY / "docs" / "results.md").read_text(encoding="utf-8")
    section = results.partition("## One H200,")[2].partition("\n## ")[0]
    measured = {}
    for row in re.findall(r"^\|(\d.+)\|$", section, flags=re.MULTILINE):
        batch, prompt, _, graph, vllm, eager, floor, *_ = [*row.split("|"), "", "", "", "", "", ""]
        measured.setdefault((batch, prompt), [figures(cell)[:1] for cell in (graph, eager, vllm, floor)])
    rows = re.findall(r"^\|(\d.+)\|$", READMES[0].read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(rows) == 5
    for row in rows:
        batch, prompt, *shown = row.split("|")
        assert [figures(cell) for cell in shown] == measured[batch, prompt]


def test_readme_starts_with_two_commands():
    section = READMES[0].read_text(encoding="utf-8").partition("## Two commands\n")[2].partition("\n## ")[0]
    assert code_blocks(section, "bash") == ["bash models/qwen3_moe/infer.sh\n", "bash tests/run.sh\n"]


# Names of settings in other engines


def foreign_names(text: str) -> list[tuple[str, list[str]]]:
    """(foreign name, counterparts here) from the table for users of other engines."""
    body = text.partition("## Coming from vLLM or transformers\n")[2].partition("\n## ")[0]
    found = []
    for there, here in re.findall(r"^\|(`.+)\|(.+)\|$", body, flags=re.MULTILINE):
        counterparts = [code.partition(":")[0] for code in re.findall(r"`([^`]+)`", here)]
        found += [(name.partition(":")[0], counterparts) for name in re.findall(r"`([^`]+)`", there)]
    return found


FOREIGN_NAMES = foreign_names(CONFIGURATION.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("name", "counterparts"), FOREIGN_NAMES, ids=[name for name, _ in FOREIGN_NAMES])
def test_the_page_and_the_hints_agree(name, counterparts):
    advice = hint(name)
    assert advice is not None
    if not counterparts:
        assert re.match("there is no|there is one|only", advice)
        return
    words = set(re.findall(r"\w+", advice))
    assert any(set(re.findall(r"\w+", counterpart.rpartition(".")[2])) & words for counterpart in counterparts)
    dotted = {counterpart for counterpart in counterparts if re.fullmatch(r"\w+\.\w+", counterpart)}
    assert dotted <= set(settings_in_code())


def test_well_known_names_are_on_the_page():
    names = {name for name, _ in FOREIGN_NAMES}
    assert names >= set(
        "max_tokens max_model_len tensor_parallel_size gpu_memory_utilization hf_overrides enforce_eager quantization "
        "trust_remote_code max_num_seqs torch_dtype device_map".split()
    )


# Messages


def quoted_messages(text: str) -> list[str]:
    """Longest literal part of each message in the tables of troubleshooting."""
    cells = [row.split("|")[0] for row in re.findall(r"^\|(.+)\|$", text, flags=re.MULTILINE)]
    messages = [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]
    return [max(re.split(r"\.\.\.|2\.x", message), key=len).strip() for message in messages]


def sources() -> str:
    rooms = [REPOSITORY / name for name in ("executor", "models", "ops")]
    files = [file for room in rooms for suffix in ("py", "sh") for file in sorted(room.rglob(f"*.{suffix}"))]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def unknown_messages(text: str) -> list[str]:
    """Quoted messages that are not in the sources."""
    code, of_libraries = sources(), {"implicit factor"}
    return [message for message in quoted_messages(text) if message not in code and message not in of_libraries]


def test_messages_of_troubleshooting_exist():
    text = (REPOSITORY / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    assert len(quoted_messages(text)) > 20
    assert unknown_messages(text) == []


def test_removed_message_is_detected():
    table = "|You see|What to do|\n|---|---|\n|`unknown key`, `rope parameters are ... incomplete`|...|\n"
    assert unknown_messages(table) == ["rope parameters are"]
