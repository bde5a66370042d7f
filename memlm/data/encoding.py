"""Parts of a corpus, encoded in parallel processes into shards on disk.

A shard is three files: NAME.bin holds tokens, NAME.npy a table of the documents, and NAME.json, written last, their
sizes and SHA-256. A shard's name is a hash of everything that determines its content, so a stopped preparation goes on
where it was, on any number of processes, and a corpus with one more file encodes that file alone.
"""

import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from memlm import files

from .documents import Corpus, Document, Part, place
from .tokenizer import continuer, encoder, fingerprint

# Part of every shard's name; increase it if the files or the cuts change.
_FORMAT = 1
# Characters of text in a shard.
_SHARD = 2**25
# Columns of a shard's table: where the document ends in the shard; its file, an index into the part's spans; its row;
# whether it ends there; its place in the order of hashes, by which documents are held out.
ENDS, FILE, ROW, WHOLE, KEY = range(5)
# done, total: in a unit of the corpus
Report = Callable[[int, int], None]


class Preparation:
    """How data is prepared: by how many processes (None: one for each core), and who sees how far it is."""

    workers: int | None = None

    def say(self, line: str) -> None:
        """Show a line."""

    def advance(self, name: str, done: int, total: int) -> None:
        """Show how much of a source is encoded, in a unit of the source."""


QUIET = Preparation()


@dataclass(frozen=True)
class TokenShard:
    """Facts on a shard; stretches: rows of its table; last: whether its part ends with it"""

    name: str
    tokens: int
    stretches: int
    last: bool
    digests: list[str]
    bytes: list[int]

    def is_whole(self, folder: Path, thorough: bool = False) -> bool:
        """Whether its files have their sizes; thorough: and their content."""
        paths = self.paths(folder)
        try:
            whole = [path.stat().st_size for path in paths] == self.bytes
            return whole and (not thorough or [*map(files.digest, paths)] == self.digests)
        except OSError:
            return False

    def paths(self, folder: Path) -> list[Path]:
        return [folder / f"{self.name}.bin", folder / f"{self.name}.npy"]

    def remove(self, folder: Path) -> None:
        for path in (folder / f"{self.name}.json", *self.paths(folder)):
            path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Encoding:
    """How the parts of a corpus become shards in a folder."""

    corpus: Corpus
    tokenizer: PreTrainedTokenizerFast
    folder: Path
    shard_characters: int = _SHARD

    def run(self, workers: int, report: Report) -> list[list[TokenShard]]:
        """The shards of each part, encoded by up to `workers` processes. Raises ValueError with a damaged file."""
        parts = self.corpus.parts
        total = sum(span.end - span.start for span in chain.from_iterable(parts))
        if (workers := min(workers, len(parts))) > 1:
            shards = self._in_processes(workers, lambda done: report(done, total))
            report(total, total)
            return shards
        done = 0

        def tell(number: int) -> None:
            nonlocal done
            report(done := done + number, total)

        return [self.encode(part, tell) for part in parts]

    def _in_processes(self, workers: int, tell: Callable[[int], None]) -> list[list[TokenShard]]:
        """`run` in forks of a new process: they share its memory, and inherit no threads and no device."""
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        environment = os.environ | {"PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", f"from {__name__} import serve; serve()"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
            assert process.stdin is not None and process.stdout is not None
            try:
                pickle.dump((self, workers), process.stdin)
                process.stdin.flush()
                for line in process.stdout:
                    told, value = json.loads(line)
                    if told in ("ValueError", "OSError"):
                        raise (ValueError if told == "ValueError" else OSError)(value)
                    if told == "shards":
                        return [[TokenShard(**shard) for shard in of_part] for of_part in value]
                    tell(value)
                raise BrokenPipeError
            except BrokenPipeError:
                raise ValueError(
                    "a process that encodes text has died, perhaps for want of memory; the same command goes on there"
                ) from None
            finally:
                process.kill()

    def encode(self, part: Part, tell: Callable[[int], None]) -> list[TokenShard]:
        """The shards of a part, written now or earlier; `tell` is called with numbers of bytes that are done, or of
        tokens, if these are limited.
        """
        most = self.corpus.part_tokens
        key = [_FORMAT, self._tokens, self.shard_characters, most, self.corpus.identity(part)]
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
        documents, known, told, shards = self.corpus.read(part), 0, 0, list[TokenShard]()

        def advance(at: int, tokens: int) -> None:
            nonlocal told
            at = at if most is None else min(most, sum(shard.tokens for shard in shards) + tokens)
            tell(at - told)
            told = at

        while not shards or not shards[-1].last:
            shard = self._finished(f"{name}-{len(shards):05}")
            if shard is None:
                # Read again what earlier shards hold.
                next(islice(documents, known, known), None)
                left = None if most is None else most - sum(shard.tokens for shard in shards)
                shard, known = self._write(f"{name}-{len(shards):05}", part, documents, advance, left), 0
            else:
                known += shard.stretches
            shards.append(shard)
        tell(sum(span.end - span.start for span in part) - told)
        return shards

    @cached_property
    def _tokens(self) -> str:
        return fingerprint(self.tokenizer)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint16 if max(self.tokenizer.get_vocab().values()) < 2**16 else np.uint32)

    def _finished(self, name: str) -> TokenShard | None:
        try:
            shard = TokenShard(**files.read_json(self.folder / f"{name}.json"))
        except (ValueError, TypeError):
            return None
        return shard if shard.is_whole(self.folder, thorough=True) else None

    def _write(
        self,
        name: str,
        part: Part,
        documents: Iterator[tuple[Document, int]],
        advance: Callable[[int, int], None],
        most: int | None,
    ) -> TokenShard:
        """The next shard of a part, which ends at the document that fills it, or reaches the `most` tokens."""
        encode, go_on, end = encoder(self.tokenizer), continuer(self.tokenizer), self.tokenizer.eos_token_id
        dtype, numbers = self.dtype, {span.file: number for number, span in enumerate(part)}
        tokens, size, table, digest = 0, 0, array("q"), hashlib.sha256()
        partial = files.beside(self.folder / f"{name}.bin")
        try:
            with partial.open("xb") as file:
                # A file that nobody holds is of a process that was killed, see `remove_remains`.
                with suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_EX)
                for document, at in documents:
                    ids = encode(document.text) if document.starts else go_on([document.text])[0]
                    ids = ids.astype(dtype)
                    data = (np.append(ids, dtype.type(end)) if document.ends else ids).tobytes()
                    file.write(data)
                    digest.update(data)
                    tokens, size = tokens + len(data) // dtype.itemsize, size + len(document.text)
                    key = place(self.corpus.name(document.file, document.row) + document.unit)
                    # As a signed number of the same order.
                    row = (tokens, numbers[document.file], document.row, document.ends, key - 2**63)
                    table.extend(row)
                    advance(at, tokens)
                    last = most is not None and tokens >= most
                    if last or size >= self.shard_characters:
                        break
                else:
                    last = True
                file.flush()
                os.fsync(file.fileno())
            partial.rename(self.folder / f"{name}.bin")
        finally:
            partial.unlink(missing_ok=True)
        content = io.BytesIO()
        np.save(content, np.array(table, np.int64).reshape(-1, 5))
        files.write(self.folder / f"{name}.npy", content.getvalue())
        digests = [digest.hexdigest(), hashlib.sha256(content.getvalue()).hexdigest()]
        sizes = [tokens * dtype.itemsize, len(content.getvalue())]
        shard = TokenShard(name, tokens, len(table) // 5, last, digests, sizes)
        files.write(self.folder / f"{name}.json", json.dumps(asdict(shard)))
        return shard


def remove_remains(store: Path) -> None:
    """Remove the unfinished shards of killed processes: files of a minute ago or earlier that no process holds."""
    for path in store.glob("*.bin.partial-*"):
        with suppress(OSError), path.open("rb") as file:
            if time.time() - path.stat().st_mtime > 60:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


def serve() -> None:
    """Encode the parts of the pickled `Encoding` in stdin; write progress, and shards or an error, to stdout."""
    # The parent stops its processes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    out = os.fdopen(os.dup(1), "w", buffering=1)
    # Whatever else is printed must not get between.
    os.dup2(2, 1)
    job, workers = pickle.load(sys.stdin.buffer)
    context = multiprocessing.get_context("fork")
    progress = context.Value("q", 0)
    pool = ProcessPoolExecutor(workers, context, _begin, (job, progress))
    tasks = [pool.submit(_encode, number) for number in range(len(job.corpus.parts))]
    # Only now, because forks must not inherit threads.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    waiting = {*tasks}
    try:
        while waiting:
            ended, waiting = wait(waiting, timeout=0.5, return_when=FIRST_EXCEPTION)
            for task in ended:
                task.result()
            print(json.dumps(["done", progress.value]), file=out)
        print(json.dumps(["shards", [[asdict(shard) for shard in task.result()] for task in tasks]]), file=out)
    except (ValueError, OSError) as error:
        print(json.dumps(["ValueError" if isinstance(error, ValueError) else "OSError", str(error)]), file=out)
    except BaseException:
        traceback.print_exc()
    finally:
        out.close()
        # Without waiting for parts that are being encoded.
        os._exit(0)


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


# Set in each worker.
_job: Encoding
_progress: Any


def _begin(job: Encoding, progress: Any) -> None:
    global _job, _progress
    _job, _progress = job, progress
    threading.Thread(target=_end_with_server, daemon=True).start()


def _end_with_server() -> None:
    server = multiprocessing.parent_process()
    assert server is not None
    server.join()
    os._exit(1)


def _encode(number: int) -> list[TokenShard]:
    def tell(done: int) -> None:
        with _progress.get_lock():
            _progress.value += done

    return _job.encode(_job.corpus.parts[number], tell)
