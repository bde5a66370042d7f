"""Files and folders that appear completely or not at all, survive a crash of the machine, and have one writer.

A file or a folder is made beside its place, flushed to the disk, and renamed. A process that dies leaves
``*.partial-*`` behind, which nothing reads. A sealed folder has a digest of each file, written last.
"""

import fcntl
import hashlib
import json
import os
import shutil
import socket
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DIGESTS = "digests.json"
# The weights of a checkpoint, in one file, or in several with an index.
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# The folder of a checkpoint with the parts of processes that share the parameters.
PARTS = "sharded"
# A page for readers, which a user may edit.
CARD = "README.md"


def sync(path: Path) -> None:
    """Flush a file's content, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it. Raises OSError with the file that is in its place."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        file = next((path for path in (folder, *folder.parents) if path.exists()), folder)
        raise NotADirectoryError(f"{folder}: {file.name} is a file; name another folder") from error


def write(path: Path, content: str | bytes) -> None:
    """Replace a file in one step, also while others read or write it."""
    make_folder(path.parent)
    partial = beside(path)
    try:
        with partial.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_tensors(path: Path, tensors: dict[str, Any], words: dict[str, str]) -> None:
    """Replace a safetensors file in one step; words: its metadata."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    make_folder(path.parent)
    # A separate folder: safetensors makes another file beside the one it writes, which a kill would leave behind.
    partial = beside(path)
    partial.mkdir()
    try:
        save_file(tensors, partial / path.name, words)
        # safetensors makes the file private to its user, whatever the umask.
        (partial / path.name).chmod(partial.stat().st_mode & 0o666)
        sync(partial / path.name)
        (partial / path.name).replace(path)
    except SafetensorError as error:
        raise OSError(f"{path}: could not be written ({error}); free disk space, then save again") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    sync(path.parent)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill. At the end of the block it is sealed and gets its name; if the block raises, it is removed.

    A folder that has the name by then stays, and the new one is dropped.
    """
    make_folder(folder.parent)
    partial = beside(folder)
    partial.mkdir()
    try:
        yield partial
        seal(partial)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
        sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def beside(path: Path) -> Path:
    """A new name for what is to get this one."""
    # Not tempfile, whose files are private to their user: others may read a shared cache.
    return path.with_name(f"{path.name}.partial-{uuid.uuid4().hex[:12]}")


def seal(folder: Path) -> None:
    """Write the size and SHA-256 of each file below ``folder``, except its card, to ``digests.json``, and flush
    everything to the disk.
    """
    apart = (folder / DIGESTS, folder / CARD)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path not in apart]
    digests = {path.relative_to(folder).as_posix(): _entry(path) for path in files}
    for path in [*files, *(path for path in folder.rglob("*") if path.is_dir())]:
        sync(path)
    write(folder / DIGESTS, json.dumps(digests, indent=1))


def add_to_seal(folder: Path, files: Iterable[Path]) -> None:
    """Move files into a sealed folder, each in one step, and add their digests."""
    digests = read_json(folder / DIGESTS)
    for path in files:
        digests[path.name] = _entry(path)
        sync(path)
        path.replace(folder / path.name)
    sync(folder)
    write(folder / DIGESTS, json.dumps(digests, indent=1))


def _entry(path: Path) -> list[int | str]:
    return [path.stat().st_size, digest(path)]


def in_parts_alone(folder: Path) -> bool:
    """Whether a checkpoint has its weights in parts, and not whole."""
    return (folder / PARTS).is_dir() and not any((folder / name).exists() for name in (WHOLE, INDEX))


def is_sealed(folder: Path) -> bool:
    return (folder / DIGESTS).is_file()


def check_seal(folder: Path) -> None:
    """Raise ValueError with the first file below ``folder`` that is missing or differs from the sealed one."""
    digests = read_json(folder / DIGESTS)
    for name, entry in digests.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path}: missing")
        if _entry(path) != entry:
            raise ValueError(f"{path}: damaged; its content is not the one that was written")


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Be the only process that writes below ``folder``. The lock ends with the process, also after a crash.

    Raises ValueError with the other process if one holds the lock.
    """
    make_folder(folder)
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read(200).strip() or "another process"
            raise ValueError(f"{folder}: {owner} writes there; wait for it to end, or name another folder") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def read_json(path: Path, kind: type = dict) -> Any:
    """The content of a JSON file. Raises ValueError with the file's name if it is not JSON of this kind."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error).splitlines()[0]
        raise ValueError(f"{path}: cannot be read as JSON: {reason}") from None
    if not isinstance(content, kind):
        wanted = {dict: "an object", list: "a list"}.get(kind, kind.__name__)
        raise ValueError(f"{path}: must hold {wanted}, not {type(content).__name__}")
    return content


def drop_earlier_weights(folder: Path) -> None:
    """After a save by transformers, remove the whole file of an earlier save if this one is in shards, or the earlier
    index if this one is whole. transformers leaves them, and would load them.
    """
    whole, index = folder / WHOLE, folder / INDEX
    if whole.exists() and index.exists():
        # It removes the shards themselves.
        sharded = any(folder.glob("model-*-of-*.safetensors"))
        (whole if sharded else index).unlink()


def weight_map(index: Path) -> dict[str, str]:
    """The file of each weight, from the index of a checkpoint. Raises ValueError if it has another form."""
    held = read_json(index)
    places = held.get("weight_map")
    inside = isinstance(places, dict) and all(
        isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors") for name in places.values()
    )
    if not (isinstance(places, dict) and places and inside and isinstance(held.get("metadata"), dict)):
        raise ValueError(f"{index}: must hold metadata, and a weight_map to *.safetensors beside it; copy it again")
    return places
