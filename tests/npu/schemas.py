# SPDX-License-Identifier: Apache-2.0
"""torch_npu's schemas and meta functions from the wheel file alone: no CANN, no compiler, nothing installed.

The schema strings are text in libtorch_npu.so; the meta functions are Python and run against a stand-in module.
`load` replaces torch.ops.npu and sys.modules["torch_npu"], so it needs a process of its own.

    python tests/npu/schemas.py     writes the schemas of the operations ops/npu uses into tests/npu/schemas/
"""

import ast
import re
import sys
import types
import zipfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
BACKEND = ROOT / "ops/npu"
FILES = Path(__file__).with_suffix("")
LIBRARY = "torch_npu/lib/libtorch_npu.so"
META_FILES = ("torch_npu/op_plugin/meta/_meta_registrations.py", "torch_npu/op_plugin/meta/_fake_registrations.py")
SCHEMA = re.compile(rb"(?<=\0)([A-Za-z_]\w*(?:\.\w+)?\([^\0]{0,8000}?\) -> [^\0]{1,300})(?=\0)")
DTYPES = {  # torch_npu's codes of number formats that torch lacks, as the meta functions compare them
    "int4": 285,
    "hifloat8": 290,
    "float8_e5m2": 291,
    "float8_e4m3fn": 292,
    "float8_e8m0fnu": 293,
    "float4_e2m1fn_x2": 296,
    "float4_e1m2fn_x2": 297,
    "uint8": 260,
}
SOC_ASCEND910_9391 = 250  # Atlas A3
ERRORS = (
    "PARAM TYPE VALUE PTR INTERNAL MEMORY NOT_SUPPORT NOT_FOUND UNAVAIL SYSCALL TIMEOUT PERMISSION ACL HCCL GE EXCEPT"
)
UNKNOWN_TYPES = re.compile(r"__torch__|Dimname")  # classes of absent libraries, and types that torch no longer parses
libraries = []  # definitions live as long as their library object


def schema_strings(wheel: Path) -> list[str]:
    """All operator schemas of a wheel, in the order of the library."""
    with zipfile.ZipFile(wheel) as archive:
        return list(dict.fromkeys(text.decode() for text in SCHEMA.findall(archive.read(LIBRARY))))


def committed_schemas(version: str) -> dict[str, str]:
    """The schemas committed to the repository, by name."""
    lines = (FILES / f"{version}.txt").read_text(encoding="utf-8").splitlines()
    return {line.partition("(")[0]: line for line in lines if line and not line.startswith("#")}


def backend_calls() -> list[ast.Call]:
    """Every call npu.<operation>(...) in the backend's source."""
    return [
        node
        for file in sorted(BACKEND.glob("*.py"))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "npu"
    ]


def used_schemas(wheel: Path) -> dict[str, str]:
    """The schemas of the operations that the backend calls, by name, default overloads only."""
    by_name = {text.partition("(")[0]: text for text in schema_strings(wheel)}
    names = sorted({call.func.attr for call in backend_calls()})
    return {name: by_name[name] for name in names if name in by_name}


def module(name: str, **attributes: object) -> types.ModuleType:
    made = types.ModuleType(name)
    made.__path__ = []
    made.__dict__.update(attributes)
    sys.modules[name] = made
    parent, _, leaf = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], leaf, made)
    return made


def load(wheel: Path) -> None:
    """Makes torch.ops.npu.* and `import torch_npu` work on meta tensors."""
    library = torch.library.Library("npu", "DEF")
    libraries.append(library)
    for text in schema_strings(wheel):
        if not UNKNOWN_TYPES.search(text):
            library.define(text)
    code_text = " [ERR {}]".format
    stand_in = module("torch_npu", __version__=wheel.name.split("-")[1], **DTYPES)
    stand_in.__getattr__ = lambda name: getattr(torch.ops.npu, name)
    module("torch_npu.utils")
    module("torch_npu.npu", get_device_name=lambda: "Ascend910_9391")
    codes = types.SimpleNamespace(**{name: name for name in ERRORS.split()})
    module("torch_npu.utils._error_code", ErrCode=codes, ops_error=code_text, pta_error=code_text)
    module("torch_npu.npu.utils", get_cann_version=lambda *_: "9.0.0", _is_gte_cann_version=lambda *_: True)
    module("torch_npu.npu._backends", get_soc_version=lambda: SOC_ASCEND910_9391)
    with zipfile.ZipFile(wheel) as archive:
        for file in META_FILES:
            if file in archive.namelist():
                source = compile(archive.read(file).decode(), file, "exec")
                exec(source, module(file.removesuffix(".py").replace("/", "_")).__dict__)
    # the only operation used that has no meta function; it keeps the logical shape
    meta = torch.library.Library("npu", "IMPL", "Meta")
    libraries.append(meta)
    meta.impl("npu_format_cast", lambda tensor, acl_format, **_: torch.empty_like(tensor))


def write_committed() -> None:
    from tests.npu.wheels import VERSIONS, wheel

    FILES.mkdir(exist_ok=True)
    for version in VERSIONS:
        lines = [f"# SPDX-License-Identifier: Apache-2.0\n# torch_npu {version}: schemas of what ops/npu calls"]
        lines += used_schemas(wheel(version)).values()
        (FILES / f"{version}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    write_committed()
