"""The files that `paths` names: files, folders (recursively), or globs, by one rule.

Links are followed, a file counts once, and no file is opened. Left out are: hidden files and folders (.git,
.ipynb_checkpoints) unless named; files whose ending is not a text's; pipes and devices; broken links.
"""

import glob
import os
import stat
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

PACKED = (".gz", ".xz", ".zst")


class Found(NamedTuple):
    """files: names by path, in the order of the given paths, sorted by name within each
    left_out: reasons by name

    A name is a path relative to the parent of the given folder, file or glob root.
    """

    files: dict[Path, str]
    left_out: dict[str, str]


def ending(path: Path) -> str:
    """ ".txt" of A.TXT, ".jsonl.gz" of a.b.jsonl.gz"""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    return "".join(suffixes if suffixes[-1:] and suffixes[-1] in PACKED else suffixes[-1:])


def find(paths: str | Sequence[str], endings: Collection[str]) -> Found:
    """The files with these endings. Raises ValueError with the path if it contains no such file."""
    specs = [paths] if isinstance(paths, str) else paths
    if not isinstance(specs, Sequence) or not all(isinstance(spec, str) and spec.strip() for spec in specs):
        raise ValueError(f"paths={paths!r} must name a file, a folder or a glob, or be a list of such")
    files: dict[str, tuple[str, Path, str]] = {}
    left_out: dict[Path, tuple[str, str]] = {}
    for spec in specs:
        _find(spec, endings, files, left_out)
    found = {path: name for _, path, name in files.values()}
    return Found(found, dict(of for path, of in left_out.items() if path not in found))


def _find(
    spec: str, endings: Collection[str], files: dict[str, tuple[str, Path, str]], left_out: dict[Path, tuple[str, str]]
) -> None:
    path = Path(os.path.abspath(os.path.expanduser(spec)))
    hidden: list[Path] = []
    try:
        if path.is_dir():
            root, matches = path, [*_walk(path, ("**",), hidden)]
        elif os.path.lexists(path):
            root, matches = path, [path]
        elif glob.has_magic(spec):
            root = next(parent for parent in path.parents if parent.is_dir() or not glob.has_magic(str(parent)))
            matches = [*_walk(root, path.relative_to(root).parts, hidden)] if root.is_dir() else []
            if not matches and not hidden:
                raise ValueError(f"paths: nothing matches {path}; correct the glob")
        else:
            raise ValueError(f"paths: {path} does not exist; give a file, a folder or a glob")
    except OSError as error:
        raise ValueError(
            f"paths: {error.filename} cannot be read ({error.strerror}); change its permissions, or leave it out"
        ) from error
    reasons = dict.fromkeys(hidden, "hidden")
    good = []
    for match in matches:
        if reason := _unfit(match, endings):
            reasons[match] = reason
        else:
            good.append((*_place(match, root), match))
    if not good:
        told = f" ({counted(reasons.values())})" if reasons else ""
        known = ", ".join(end for end in endings if not end.endswith(PACKED))
        raise ValueError(f"paths: {path} holds no text{told}; supported are {known}")
    left_out |= {match: (match.relative_to(root.parent).as_posix(), reason) for match, reason in reasons.items()}
    mine: dict[str, tuple[str, Path, str]] = {}
    # Within one spec, a path without a link names a file, if there is one. Among several specs, the last in
    # alphabetical order counts.
    for _, name, real, match in sorted(good):
        mine.setdefault(real, (spec, match, name))
    for real, entry in sorted(mine.items(), key=lambda item: item[1][2]):
        files[real] = max(files.get(real, entry), entry)


def _place(match: Path, root: Path) -> tuple[bool, str, str]:
    """Whether the way from the root contains a link; the name; and the path without links."""
    real, below = os.path.realpath(match), match.relative_to(root)
    return real != os.path.join(os.path.realpath(root), below), match.relative_to(root.parent).as_posix(), real


def _walk(root: Path, pattern: tuple[str, ...], hidden: list[Path]) -> Iterator[Path]:
    """Matches of the pattern below the root that are no folders, and all files in matching folders.

    Each folder is visited once, linked ones last. Hidden matches are added to `hidden`.
    """
    pending, seen = deque([(root, pattern)]), set()
    while pending:
        folder, parts = pending.popleft()
        if (place := (os.path.realpath(folder), parts)) in seen:
            continue
        seen.add(place)
        part, *rest = parts
        if part == "**" and rest:
            # ``**`` also matches no folder at all.
            pending.appendleft((folder, tuple(rest)))
        with os.scandir(folder) as entries:
            # Sorted, so that a folder behind two links gets its name from the same link on every machine.
            for entry in sorted(entries, key=lambda entry: entry.name):
                path = Path(entry.path)
                # Not entry.is_dir(), which raises on a link to itself.
                is_folder = os.path.isdir(entry.path)
                if (rest and not is_folder) or not (part == "**" or fnmatchcase(entry.name, part)):
                    continue
                if entry.name.startswith(".") and not part.startswith("."):
                    hidden.append(path)
                elif not is_folder:
                    yield path
                else:
                    below = (path, parts if part == "**" else tuple(rest) or ("**",))
                    (pending.append if entry.is_symlink() else pending.appendleft)(below)


def _unfit(path: Path, endings: Collection[str]) -> str | None:
    """The reason to leave a file out; None for none."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return "a link to nothing" if path.is_symlink() else str(error.strerror).lower()
    if not stat.S_ISREG(mode):
        return "not a file"
    return None if ending(path) in endings else f"ending in {ending(path)}" if ending(path) else "without an ending"


def counted(reasons: Collection[str]) -> str:
    """1 a link to nothing, 2 hidden"""
    return ", ".join(f"{[*reasons].count(reason)} {reason}" for reason in dict.fromkeys(sorted(reasons)))
