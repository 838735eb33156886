# SPDX-License-Identifier: Apache-2.0
"""Import rules: executor -> models -> ops, and optional packages are imported only where they are used."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {"executor": ("executor", "models", "ops"), "models": ("models", "ops"), "ops": ("ops",)}
FILES = sorted(file for room in ROOMS for file in (ROOT / room).rglob("*.py"))
VENDORS = ("torch_npu", "triton")
# Documented names that may be imported anywhere; undocumented ones are confined to adapters.
DOCUMENTED = {
    "transformers": {"transformers", "transformers.utils.logging"},
    "triton": {"triton", "triton.language", "triton.language.extra.cuda", "triton.tools.tensor_descriptor"},
}
ADAPTERS = ("models/transformers_internals.py", "ops/cuda/triton_internals.py")
UNDOCUMENTED = ("ROPE_INIT_FUNCTIONS", "RopeParameters", "knobs")
USES_TORCHRUN = ("executor/launch/ranks.py",)  # all other collectives belong to ops/comm.py
OPTIONAL = ("datasets", "fastapi", "matplotlib", "uvicorn")


def imports(tree: ast.AST, file: Path, inside_functions: bool = True) -> Iterator[str]:
    """Full names of all imports of a file; optionally only those at module level."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = file.relative_to(ROOT).parts[: -node.level or None] if node.level else ()
            module = ".".join((*package, *([node.module] if node.module else [])))
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            called = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            if called in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
                yield node.args[0].value
        if inside_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports(node, file, inside_functions)


def parse(file: Path) -> ast.AST:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def names_in(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def name(file: Path) -> str:
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("file", FILES, ids=name)
def test_direction(file):
    room = file.relative_to(ROOT).parts[0]
    forbidden = ("tests", *(other for other in ROOMS if other not in ROOMS[room]))
    assert not [module for module in imports(parse(file), file) if names_in(module, forbidden)]


@pytest.mark.parametrize("file", FILES, ids=name)
def test_optional_packages(file):
    tree = parse(file)
    everywhere, on_load = list(imports(tree, file)), list(imports(tree, file, inside_functions=False))
    if not name(file).startswith("ops/"):
        assert not [module for module in everywhere if names_in(module, VENDORS)]
    assert not [module for module in on_load if names_in(module, OPTIONAL)]
    if not name(file).startswith("ops/") and name(file) not in USES_TORCHRUN:
        assert not [module for module in everywhere if names_in(module, ("torch.distributed",))]
        assert "torch.distributed" not in {
            ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)
        }


@pytest.mark.parametrize("file", [file for file in FILES if name(file) not in ADAPTERS], ids=name)
def test_undocumented_parts_are_used_by_adapters_only(file):
    tree = parse(file)
    assert not undocumented(tree, file)


def undocumented(tree: ast.AST, file: Path) -> list[str]:
    """Undocumented modules, names and underscore attributes of transformers and Triton used by a file."""
    found = []
    for module in imports(tree, file):
        parent, _, imported = module.rpartition(".")
        allowed = DOCUMENTED.get(module.partition(".")[0])
        if allowed is not None and (imported in UNDOCUMENTED or not allowed & {module, parent}):
            found.append(module)
    theirs = [module for module in imports(tree, file) if module.partition(".")[0] in DOCUMENTED]
    names = {module.rpartition(".")[2] for module in theirs}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).partition(".")[0] in names:
            is_private = node.attr.startswith("_") and not node.attr.startswith("__")
            if is_private or node.attr in UNDOCUMENTED:
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from transformers import AutoModelForCausalLM\nimport triton.language as tl", []),
        ("from transformers.models.qwen2 import Tokenizer", ["transformers.models.qwen2.Tokenizer"]),
        ("from transformers import ROPE_INIT_FUNCTIONS", ["transformers.ROPE_INIT_FUNCTIONS"]),
        ("from transformers import Model\nModel._from_config(1)", ["Model._from_config"]),
        ("import triton\ntriton.knobs.runtime.interpret", ["triton.knobs"]),
        ("import triton.runtime.jit", ["triton.runtime.jit"]),
    ],
)
def test_undocumented_parts_are_found(source, expected):
    assert undocumented(ast.parse(source), ROOT / "ops/cuda/some.py") == expected


def test_type_checkers_see_what_is_imported_on_first_use():
    import executor

    tree = parse(ROOT / "executor" / "__init__.py")
    branches = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
    [block] = [node for node in branches if ast.unparse(node.test) == "TYPE_CHECKING"]
    seen = {f"{node.module}.{alias.name}" for node in block.body for alias in node.names}
    assert seen == {f"{module}.{exported}" for exported, module in executor.EXPORTS.items()}
    assert sorted(executor.__all__) == sorted(executor.EXPORTS)


def loaded_by(statement: str) -> set[str]:
    """Top-level modules in sys.modules of a new interpreter after a statement."""
    program = (
        f"{statement}\nimport json, sys\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_without_optional_packages():
    hidden = "".join(f"sys.modules[{module!r}] = None\n" for module in (*VENDORS, *OPTIONAL))  # fail to import
    loaded = loaded_by(
        f"import sys\n{hidden}import executor\nfrom executor import LLM, RequestOutput, SamplingParams\n"
        "import executor.infer, executor.llm\n"
        "assert type(sys.modules['transformers.models']).__name__ == 'UnreadModels'\n"
        "import transformers\n"
        "assert transformers.models.gpt2.GPT2Config is transformers.GPT2Config\n"  # a submodule, not imported yet
        "from transformers.models import LlamaConfig, llama, qwen3_moe\n"
        "assert type(sys.modules['transformers.models']).__name__ != 'UnreadModels'\n"
        "assert LlamaConfig is llama.LlamaConfig and qwen3_moe.Qwen3MoeConfig is transformers.Qwen3MoeConfig\n"
        "assert not hasattr(transformers.models, 'Llama0Config')"
    )
    assert {"executor", "models", "ops", "torch", "transformers"} <= loaded


def test_infer_does_not_import_torch():
    assert not loaded_by("import executor, executor.infer") & {"torch", "transformers", *OPTIONAL}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import ops.x, models", ["ops.x", "models"]),
        ("def f():\n    from models.y import z", ["models.y.z"]),
        ("try:\n    import triton\nexcept ImportError:\n    pass", ["triton"]),
        ("from . import x\nfrom ..models import y", ["ops.cuda.x", "ops.models.y"]),
        ("import importlib\nimportlib.import_module('models.x')", ["importlib", "models.x"]),
    ],
)
def test_imports_are_found(source, expected):
    assert list(imports(ast.parse(source), ROOT / "ops/cuda/some.py")) == expected
