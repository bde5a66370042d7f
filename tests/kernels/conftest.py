"""Triton's interpreter in two thirds of its time, for the tests of kernels."""

from typing import Any

try:
    from triton.runtime import interpreter
except ImportError:
    pass
else:
    _seen = set[Any]()

    def _call(function: Any, *given: Any, **named: Any) -> Any:
        """A function inside a kernel. Triton replaces its language at each such call; once is enough, because a launch
        replaces and restores its own.
        """
        if function.fn not in _seen:
            _seen.add(function.fn)
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*given, **named)

    if all(hasattr(interpreter, name) for name in ("InterpretedFunction", "_patch_lang")):
        interpreter.InterpretedFunction.__call__ = _call
