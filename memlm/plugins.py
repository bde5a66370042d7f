"""Parts from outside the repository: modules that installed packages name in entry points.

The groups are ``memlm.memory``, ``memlm.data`` and ``memlm.measure``. In a package's pyproject.toml,

    [project.entry-points."memlm.memory"]
    ema = "foo.ema"

makes ``kind: ema`` the module ``foo.ema``, written like a module of ``memlm.memory``. CONTRIBUTING.md has an example
of each group.
"""

import functools
import sys
import textwrap
from collections.abc import Collection
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any

from memlm.settings import require, suggest


def names(group: str) -> list[str]:
    """Names of a group's parts in installed packages."""
    return sorted({point.name for point in _points(group, tuple(sys.path))})


def load(group: str, name: Any, own: Collection[str], where: str) -> ModuleType | None:
    """The module that an installed package provides under ``name``; None if ``name`` is the project's own.

    own: the project's names; where: the user's setting, ``key=value``, for errors

    Raises ValueError in one line if the name is unknown, two packages have it, or its module cannot be imported.
    """
    found = [point for point in _points(group, tuple(sys.path)) if point.name == name]
    packages = [f"{point.dist.name} {point.dist.version}" for point in found if point.dist]
    having = ["memlm", *packages] if name in own else packages
    if not having:
        known = suggest(str(name), [*own, *names(group)])
        raise ValueError(f"{where} is unknown; {known} (or install the package that brings it)")
    require(len(having) == 1, f"{where} is in {' and in '.join(having)}; keep one of them, or rename it in a package")
    if not found:
        return None
    try:
        return found[0].load()
    except Exception as error:
        reason = f"{type(error).__name__}: {textwrap.shorten(str(error), 200, placeholder=' ...')}"
        raise ValueError(f"{where}: {found[0].value} of {packages[0]} does not import ({reason})") from error


@functools.cache
def _points(group: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """Entry points of the packages on ``path``. Cached: a mixer is built for every layer, and a search reads many
    files.
    """
    return tuple(entry_points(group=group))
