"""Training data: text corpora, synthetic recall tasks, and their mixture into batches.

Files:

    build               from the ``data`` config to tokenizer and batches
    mixture             batches of several sources, functions of the step
    row                 the row that every source returns
    recall              recall tasks: MQAR in three forms, passkey, copies
    recall_mad          selective copying, and keys and values of several tokens
    guesser             the floor of recall tasks: what the answers' set gives without binding
    text                text corpora: token files and their rows
    layout              the files of an encoded corpus
    encoding            parts of a corpus, encoded in parallel processes into shards
    documents           documents of txt, md, py, jsonl and parquet files, in parts and splits
    reading             files read in stretches of bounded size
    streamed            text of the Hugging Face hub, read as a stream
    find                the files that ``paths`` name
    manifest            the files of a source, compared when a run continues
    disk_cache          folders built once and checked when opened
    tokenizer           byte, hub and BPE tokenizers
    retrieval           samples of documents, a question and its answer
    chains              chains of facts over several documents
    questions           questions from JSONL files of any size
    injected            facts that are put into single steps, and probes of them
    templates           the texts around documents, questions and answers: for training, banks and ``Interleave``
"""

from .build import build_data, is_made_by_rule
from .chains import TEMPLATES, Chains
from .disk_cache import only_built
from .documents import Documents, Texts, WholeText
from .encoding import QUIET, Preparation
from .find import counted
from .injected import InjectedSource, Injection
from .manifest import check_manifest, left_out
from .mixture import Batch, Mixture
from .questions import Question, Questions, QuestionSource
from .recall import MQAR, Passkey, RecallSource, RecallTask, ramp
from .retrieval import Chain, Facts, Inquiry, Library, Linked, RetrievalRow, make_sample
from .row import IGNORE_INDEX, SPLITS, Row, Source
from .streamed import HubSettings, Streamed
from .templates import Templates, Writer
from .text import TextCorpus, TextSource
from .tokenizer import (
    byte_tokenizer,
    encoder,
    fingerprint,
    first_token,
    is_byte_tokenizer,
    load_tokenizer,
    read_tokenizer,
    save_tokenizer,
    token_bytes,
)

__all__ = [
    "IGNORE_INDEX",
    "MQAR",
    "QUIET",
    "SPLITS",
    "TEMPLATES",
    "Batch",
    "Chain",
    "Chains",
    "Documents",
    "Facts",
    "HubSettings",
    "InjectedSource",
    "Injection",
    "Inquiry",
    "Library",
    "Linked",
    "Mixture",
    "Passkey",
    "Preparation",
    "Question",
    "QuestionSource",
    "Questions",
    "RecallSource",
    "RecallTask",
    "RetrievalRow",
    "Row",
    "Source",
    "Streamed",
    "Templates",
    "TextCorpus",
    "TextSource",
    "Texts",
    "WholeText",
    "Writer",
    "build_data",
    "byte_tokenizer",
    "check_manifest",
    "counted",
    "encoder",
    "fingerprint",
    "first_token",
    "is_byte_tokenizer",
    "is_made_by_rule",
    "left_out",
    "load_tokenizer",
    "make_sample",
    "only_built",
    "ramp",
    "read_tokenizer",
    "save_tokenizer",
    "token_bytes",
]
