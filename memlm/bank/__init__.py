"""A library of documents that a model has read: ``MemoryBank``. README.md beside this file shows how to use one.

Files:

    bank                ``MemoryBank``
    ask                 questions in words, and the passages that an answer was read from
    texts               the tokenizer that a bank keeps, and the facts on its documents
    shelf               the shards of a bank, and the place of each document
    ingest              token ids of documents, and their kept chunks
    shard               a part of a bank, in memory or mapped from a file
    folder              the folder of a bank, and its one writer at a time
    resident            the routers' keys on a GPU
    ranks               processes that share a bank
"""

from memlm.bank.bank import MemoryBank
from memlm.bank.folder import listed, read_finished

__all__ = ["MemoryBank", "listed", "read_finished"]
