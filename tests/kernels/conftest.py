"""Triton's interpreter in half of its time, for the tests of kernels; the numbers stay the same to the bit.

It spends most of its time on types and checks. Here a type is made once, operands of one type and shape are neither
converted nor broadcast, the shape to which two types are broadcast is found once, a constant is made once, and sums of
integers are not computed twice to look for an overflow that the interpreter then does not report.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import numpy as np

NAMES = (
    "InterpretedFunction",
    "TensorHandle",
    "_get_np_dtype",
    "_patch_attr",
    "_patch_lang",
    "interpreter_builder",
    "interpreter_semantic",
)

try:
    import triton.language.core as tl
    from triton.runtime import interpreter
except ImportError:
    interpreter = None


def once(make: Callable[..., Any], key: Callable[..., Any]) -> Callable[..., None]:
    """An ``__init__`` that copies the attributes of the first object with an equal key."""
    made = dict[Any, dict]()

    def init(self: Any, *given: Any) -> None:
        if (found := made.get(name := key(*given))) is None:
            make(self, *given)
            made[name] = dict(vars(self))
        else:
            vars(self).update(found)

    return init


def make_cheaper() -> None:
    semantic, seen, constants, np_dtypes = interpreter.interpreter_semantic, set[Any](), {}, {}
    spreads, members, handle_of = {}, {}, interpreter.TensorHandle
    check, broadcast = semantic.binary_op_type_checking_impl, semantic.broadcast_impl_value
    np_dtype = interpreter._get_np_dtype

    def call(function: Any, *given: Any, **named: Any) -> Any:
        """A function inside a kernel. Triton replaces its language at each such call; once is enough, because a launch
        replaces and restores its own.
        """
        if function.fn not in seen:
            seen.add(function.fn)
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*given, **named)

    def get_np_dtype(kind: Any) -> Any:
        if (found := np_dtypes.get(kind.name)) is None:
            found = np_dtypes[kind.name] = np_dtype(kind)
        return found

    def checked(x: Any, y: Any, x_ptr: bool = False, y_ptr: bool = False, same: bool = True, div: bool = False) -> Any:
        if isinstance(x, tl.tensor) and isinstance(y, tl.tensor):
            if x.dtype.name == y.dtype.name and not div and not x.dtype.is_ptr():
                return broadcasted(x, y)
        elif isinstance(x, tl.tensor) and isinstance(y, int | float):
            # A string tells 0.0 from -0.0.
            key = (x.type.name, str(y), x_ptr, y_ptr, same, div)
            if (constant := constants.get(key)) is None:
                converted, constant = check(x, y, x_ptr, y_ptr, same, div)
                if converted is not x:
                    return converted, constant
                constant.handle.data.flags.writeable = False
                constants[key] = constant
            return x, constant
        return check(x, y, x_ptr, y_ptr, same, div)

    def broadcasted(x: Any, y: Any) -> Any:
        if x.type.is_block() is y.type.is_block() and x.handle.data.shape == y.handle.data.shape:
            return x, y
        if (to := spreads.get(key := (x.type.name, y.type.name))) is None:
            pair = broadcast(x, y)
            spreads[key] = [
                None if new is old else (new.type, new.handle.data.shape)
                for old, new in zip((x, y), pair, strict=True)
            ]
            return pair
        return x if to[0] is None else spread(x, *to[0]), y if to[1] is None else spread(y, *to[1])

    def spread(x: Any, kind: Any, shape: tuple[int, ...]) -> Any:
        data = np.empty(shape, x.handle.data.dtype)
        data[...] = x.handle.data
        return tl.tensor(handle_of(data, kind.scalar), kind)

    def expand_dims(x: Any, axis: int) -> Any:
        return handle_of(x.data[(*[slice(None)] * axis, None)], x.dtype.scalar)

    def patch_attr(place: Any, name: str, member: Any, _: Any, scope: Any) -> None:
        """A member of the language with the interpreter's semantics; Triton's own first copies all arguments."""
        if (found := members.get(member)) is None:
            own = getattr(member, "__wrapped__", member)

            def found(*given: Any, **named: Any) -> Any:
                named["_semantic"] = semantic
                return own(*given, **named)

            members[member] = found
        scope.set_attr(place, name, found)

    # Its attributes are those of its type, and its numbers.
    of_type = once(tl.tensor.__init__, lambda handle, type: type.name)

    def tensor(self: Any, handle: Any, type: Any) -> None:
        of_type(self, handle, type)
        self.handle = handle

    def sizes(kind: Any, shape: Any) -> Any:
        return kind.name, *(x.value if isinstance(x, tl.constexpr) else x for x in shape)

    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter.InterpretedFunction.__call__, interpreter._get_np_dtype = call, get_np_dtype
    semantic.binary_op_type_checking_impl, semantic.broadcast_impl_value = checked, broadcasted
    interpreter._patch_attr, builder.create_expand_dims = patch_attr, expand_dims
    tl.block_type.__init__, tl.tensor.__init__ = once(tl.block_type.__init__, sizes), tensor


if os.environ.get("TRITON_INTERPRET") == "1" and all(hasattr(interpreter, name) for name in NAMES):
    make_cheaper()
