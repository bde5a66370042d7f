"""The cache on disk: folders built once from files and settings, checked when opened, and rebuilt if damaged."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from stat import S_ISREG
from typing import Any, NamedTuple

from memlm import files

# Resolution of file systems' clocks, in nanoseconds: within it, a file may change and keep its times.
_TICK = 2 * 10**9


class Content(NamedTuple):
    """State of a file when its SHA-256 was taken; `changed` in nanoseconds."""

    num_bytes: int
    changed: int
    sha256: str

    def check(self, now: os.stat_result, path: Path) -> None:
        """Raise ValueError if the file has changed since."""
        if (now.st_size, now.st_mtime_ns) != self[:2]:
            raise ValueError(f"{path} has changed since this run opened it; put it back, or start again")


class Watched:
    """A file that is read over a long time. It must not change; a new file of the same name does not matter."""

    def __init__(self, path: Path) -> None:
        self.path, self._descriptor = path, os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        stat = os.fstat(self._descriptor)
        self._content = Content(stat.st_size, stat.st_mtime_ns, "")

    def check(self) -> None:
        """Raise ValueError if it has changed."""
        self._content.check(os.fstat(self._descriptor), self.path)


_builds = ContextVar("builds", default=True)
# Bytes of unknown files that are read where nothing may be built: seconds.
_READ = 2**31


class NotBuilt(ValueError):
    """A folder is not in the cache."""


@contextmanager
def only_built() -> Iterator[None]:
    """Within the block, caches raise ``NotBuilt`` instead of building a folder, or reading many bytes of files that
    they do not know; and nothing waits for its turn.
    """
    token = _builds.set(False)
    try:
        yield
    finally:
        _builds.reset(token)


class DiskCache:
    """Folders below `root`; each one's name is a hash of everything that determines its content."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(os.path.expanduser(root)).absolute()
        self._known = self.root / "sha256.json"

    def folder(
        self,
        key: Sequence[Any],
        names: Iterable[str],
        fill: Callable[[Path], None],
        below: str = "",
        has_more: Callable[[Path], bool] = lambda folder: True,
    ) -> Path:
        """The folder of a key, filled by `fill` with files of these names, now or earlier.

        Processes may build it together: the first one to finish counts. A damaged folder is replaced, and so is one
        without the files elsewhere that it needs, see `has_more`.
        Raises ValueError if it cannot be written.
        """
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
        folder = self.root / below / digest[:32]

        def is_whole() -> bool:
            return self._is_whole(folder, names) and has_more(folder)

        try:
            if not is_whole():
                if not _builds.get():
                    raise NotBuilt(f"{folder} is not built")
                self._put_aside(folder, is_whole)
                with files.new_folder(folder) as partial:
                    fill(partial)
        except OSError as error:
            raise ValueError(
                f"data.cache_dir: {folder} cannot be made ({error}); make room, or name another folder"
            ) from error
        return folder

    @contextmanager
    def turn(self, key: Any, wait: Callable[[str], None]) -> Iterator[None]:
        """Let one process after the other do the work of a key; `wait` is called with a line if it is not yet ours.

        A cache that cannot be written to has no turns.
        """
        if not _builds.get():
            yield
            return
        name = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
        try:
            files.make_folder(self.root)
            lock = (self.root / f".turn-{name}").open("a")
        except OSError:
            yield
            return
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                wait(f"{self.root}: another process prepares the same data; waiting for it")
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def contents(self, paths: Iterable[Path]) -> dict[Path, Content]:
        """The state of each file. As in git, a file is read again only if its size or times have changed.

        Raises ValueError with the file's name if it cannot be read.
        """
        known, fresh = self._remembered(), {}
        contents, read = {}, 0
        for path in paths:
            try:
                stat = path.stat()
                if not S_ISREG(stat.st_mode):
                    # A pipe or a device may never end.
                    raise OSError(errno.EINVAL, "not a file", str(path))
                times = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
                match known.get(str(path)):
                    case [*before, str(digest)] if before == times:
                        pass
                    case _:
                        read += stat.st_size
                        if read > _READ and not _builds.get():
                            raise NotBuilt(f"{path} and others were not read before")
                        digest = files.digest(path)
                        if time.time_ns() - stat.st_mtime_ns > _TICK:
                            fresh[str(path)] = [*times, digest]
            except OSError as error:
                raise ValueError(f"{path} cannot be read ({error.strerror}); repair it, or leave it out") from error
            contents[path] = Content(stat.st_size, stat.st_mtime_ns, digest)
        if fresh:
            # Files whose state is not stored are only read again, so a read-only cache works.
            with suppress(OSError):
                files.write(self._known, json.dumps(known | fresh))
        return contents

    def _remembered(self) -> dict[str, Any]:
        try:
            return files.read_json(self._known)
        except ValueError:
            return {}

    def _is_whole(self, folder: Path, names: Iterable[str]) -> bool:
        if not files.is_sealed(folder):
            return False
        try:
            sealed = files.read_json(folder / files.DIGESTS)
            contents = self.contents(folder / name for name in sealed)
            now = {path.name: [content.num_bytes, content.sha256] for path, content in contents.items()}
        except ValueError:
            return False
        return now == sealed and sealed.keys() >= {*names}

    def _put_aside(self, folder: Path, is_whole: Callable[[], bool]) -> None:
        """Remove a damaged folder unless another process has replaced it; processes that read it may continue."""
        if not folder.exists():
            return
        with (self.root / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.exists() and not is_whole():
                aside = folder.with_name(f"{folder.name}.partial-{uuid.uuid4().hex[:12]}")
                folder.rename(aside)
                shutil.rmtree(aside, ignore_errors=True)
