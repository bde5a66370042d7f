"""The cache on disk: files and folders that appear whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_path(cache_dir: str | Path) -> Path:
    return Path(os.path.expanduser(cache_dir)).absolute()


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to fill, renamed to `folder` at the end of the block; removed if the block raises.

    Where another process was faster, its `folder` stays. A killed process leaves a `*.partial-*` folder,
    which nothing ever reads.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent))
    try:
        yield partial
        # mkdtemp makes private folders; a shared cache wants the usual permissions.
        partial.chmod(folder.parent.stat().st_mode & 0o777)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replaces `path` in one step, whoever else may be reading or writing it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    partial.write_text(text)
    partial.replace(path)
