# SPDX-License-Identifier: Apache-2.0
"""executor -> models -> ops: nothing points back, and what a machine may lack is imported only where it is used."""

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
OPTIONAL = ("datasets", "fastapi", "matplotlib", "uvicorn")


def imports(tree: ast.AST, file: Path, inside_functions: bool = True) -> Iterator[str]:
    """Full names of everything that a file imports; optionally only what is imported when it is loaded itself."""
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
def test_rare_packages(file):
    tree = parse(file)
    everywhere, on_load = list(imports(tree, file)), list(imports(tree, file, inside_functions=False))
    if not name(file).startswith("ops/"):
        assert not [module for module in everywhere if names_in(module, VENDORS)]
    assert not [module for module in on_load if names_in(module, OPTIONAL)]
    if not name(file).startswith("ops/"):
        assert not [module for module in everywhere if names_in(module, ("torch.distributed",))]
        assert "torch.distributed" not in {
            ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)
        }


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that a new Python has loaded after a statement."""
    program = (
        f"{statement}\nimport json, sys\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_using_the_package_needs_nothing_rare():
    hidden = "".join(f"sys.modules[{module!r}] = None\n" for module in (*VENDORS, *OPTIONAL))  # importing these fails
    loaded = loaded_by(
        f"import sys\n{hidden}import executor\nfrom executor import LLM, RequestOutput, SamplingParams\n"
        "import executor.infer"
    )
    assert {"executor", "models", "ops", "torch", "transformers"} <= loaded


def test_bad_input_is_refused_before_torch_is_loaded():
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
