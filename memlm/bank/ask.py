"""Questions in words: an answer, and the documents and passages that it was read from.

B rows, C chunks, J documents read, T tokens.
"""

import time
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from memlm.cache import MemoryCache
from memlm.data import Templates
from memlm_kernels.route_documents import Scored, route_documents

if TYPE_CHECKING:
    from memlm.bank.bank import MemoryBank

# The question alone.
BARE = replace(Templates.plain(), question="{question}")


class DocumentRead(NamedTuple):
    """A document that a layer read for a question.

    chunk: the chunk with the best score, counted in the document
    """

    name: str
    score: float
    chunk: int


class Reply(NamedTuple):
    """read: documents by layer, best first; passages: the text of a reading's chunk, None for a document without text
    bank_bytes: of all documents; read_bytes: keys and values that attention read, of all layers
    """

    text: str
    read: dict[int, list[DocumentRead]]
    passages: dict[tuple[str, int], str | None]
    seconds: float
    bank_bytes: int
    read_bytes: int


def ask(bank: "MemoryBank", question: str, max_new_tokens: int, templates: Templates) -> Reply:
    """See ``MemoryBank.ask``."""
    begun, model = time.perf_counter(), bank.model
    ids_BT, roles_BT = (x.to(model.device) for x in bank.wording.asked(question, templates))
    memory, end = MemoryCache(), bank.wording.tokenizer.eos_token_id
    out_BT = model.generate(
        ids_BT,
        doc_ids=roles_BT,
        memory_bank=bank,
        attention_mask=torch.ones_like(ids_BT),
        past_key_values=memory,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=end,
    )
    seconds = time.perf_counter() - begun
    read = {layer: rows[0] for layer, rows in readings(bank, memory).items()}
    passages = {(r.name, r.chunk): bank.passage(r.name, r.chunk) for of_layer in read.values() for r in of_layer}
    stats, chunks = bank.stats(), sum(int((memory.states[i]["bank"]["size"] > 0).sum()) for i in bank.layers)
    of_chunk = 2 * model.config.num_key_value_heads * model.config.head_dim * model.dtype.itemsize
    held = sum(stats[place] for place in ("device_bytes", "host_bytes", "disk_bytes"))
    text = bank.wording.decode(out_BT[0, ids_BT.shape[1] :])
    return Reply(text, read, passages, seconds, held, chunks * of_chunk)


def readings(bank: "MemoryBank", memory: MemoryCache) -> dict[int, list[list[DocumentRead]]]:
    """The documents that tokens after a question see, best first: layer -> a list per row."""
    found = {}
    for layer, rule in zip(bank.layers, bank.rules, strict=True):
        held = memory.states[layer]["bank"]
        chunks = held["size"].shape[1]
        document_BC = torch.where(held["size"] > 0, held["document"], chunks)
        routes = route_documents(
            None,
            held["router_k"],
            document_BC,
            num_documents=chunks,
            scored=Scored(held["score"], held["asked"]),
            **rule,
        )
        document_BJ, score_BJ = routes.document[:, 0], routes.score[:, 0]
        first_BJ, end_BJ = (torch.searchsorted(document_BC, document_BJ, right=right) for right in (False, True))
        of_chunk_BC = held["score"] / held["asked"].clamp(min=1) if rule["query_reduce"] == "mean" else held["score"]
        columns = (x.tolist() for x in (document_BJ, score_BJ, first_BJ, end_BJ))
        found[layer] = [
            [
                DocumentRead(bank.shelf.name(number_C[first]), score, best_in(of_chunk_C, first, end))
                for document, score, first, end in zip(*row, strict=True)
                if document >= 0
            ]
            for number_C, of_chunk_C, *row in zip(held["number"].tolist(), of_chunk_BC, *columns, strict=True)
        ]
    return found


def best_in(score_C: Tensor, first: int, end: int) -> int:
    return int(score_C[first:end].argmax())
