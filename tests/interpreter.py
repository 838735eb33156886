# SPDX-License-Identifier: Apache-2.0
"""Makes Triton's interpreter faster; what it computes and checks stays the same.

Most of its time goes to objects that describe types, and to sums whose overflow it would report only in debug mode.
A Triton without the names replaced here keeps its own functions.
"""

from functools import cache
from typing import Any


def make_faster(interpreter: Any) -> None:
    """Patches the module `triton.runtime.interpreter`."""
    core = interpreter.tl.core
    if hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = prepared_once(interpreter)
    if hasattr(interpreter, "_get_np_dtype"):
        interpreter._get_np_dtype = of_scalar(interpreter._get_np_dtype)
    if hasattr(core.block_type, "with_element_ty"):
        core.block_type.with_element_ty = shared_types(core.block_type)
    if hasattr(core, "tuple_type") and hasattr(core, "_type_for_tuple_values"):
        core._type_for_tuple_values = described_when_needed(core)
    semantic = interpreter.TritonSemantic
    if hasattr(semantic, "binary_op_sanitize_overflow_impl"):
        semantic.binary_op_sanitize_overflow_impl = reported_only(semantic.binary_op_sanitize_overflow_impl)


def prepared_once(interpreter: Any) -> Any:
    """`_patch_lang` that prepares triton.language once per launch, not per device function call."""
    prepare, nothing = interpreter._patch_lang, interpreter._LangPatchScope

    @cache
    def used_by(function: Any) -> list[Any]:
        languages = (interpreter.tl, interpreter.tl.core)
        return [value for value in function.__globals__.values() if any(value is language for language in languages)]

    def prepare_once(function: Any) -> Any:
        is_prepared = all(language.static_print is print for language in used_by(function))  # as after preparation
        return nothing() if is_prepared else prepare(function)

    return prepare_once


def of_scalar(get_np_dtype: Any) -> Any:
    """`_get_np_dtype` that builds its table of types once per type, not per call."""
    remembered = cache(get_np_dtype)

    def np_dtype(tt_dtype: Any) -> Any:
        scalar = tt_dtype.scalar  # blocks and pointers have no hash
        return (get_np_dtype if scalar.is_ptr() else remembered)(scalar)

    return np_dtype


def shared_types(block_type: Any) -> Any:
    """`with_element_ty` that returns the same object for the same shape and element type; types never change."""
    remembered = cache(block_type)
    return lambda self, scalar_ty: (block_type if scalar_ty.is_ptr() else remembered)(scalar_ty, self.shape)


def described_when_needed(core: Any) -> Any:
    """`_type_for_tuple_values` whose type is computed when it is used: every tensor's shape has one, few are used."""
    describe = core._type_for_tuple_values

    class LazyTupleType(core.tuple_type):
        def __init__(self, values: list[Any], fields: Any = None) -> None:
            self.arguments = values, fields

        def __getattr__(self, name: str) -> Any:
            if name not in ("types", "fields", "name"):
                raise AttributeError(name)
            self.__dict__ |= vars(describe(*self.arguments))
            return self.__dict__[name]

        def __eq__(self, other: object) -> bool:
            return isinstance(other, core.tuple_type) and (self.types, self.fields) == (other.types, other.fields)

        __hash__ = None  # as its base's

    return LazyTupleType


def reported_only(sanitize: Any) -> Any:
    """`binary_op_sanitize_overflow_impl` that computes nothing where its `device_assert` ignores what it is given."""
    return lambda self, *arguments: sanitize(self, *arguments) if self.builder.options.debug else None
