"""Training data: text corpora, synthetic recall tasks, and their mixture into batches."""

from .build import build_data
from .chains import TEMPLATES, Chain, Chains, Linked
from .chat import Chat
from .documents import Documents
from .mixture import Batch, Mixture
from .recall import MQAR, Passkey, RecallSource, RecallTask, ramp
from .retrieval import (
    ANSWER,
    Facts,
    Inquiry,
    Library,
    Question,
    QuestionSource,
    RetrievalRow,
    load_questions,
    make_sample,
)
from .row import IGNORE_INDEX, SPLITS, Row, Source
from .text import TextCorpus, TextSource
from .tokenizer import byte_tokenizer, load_tokenizer, token_bytes

__all__ = [
    "ANSWER",
    "IGNORE_INDEX",
    "MQAR",
    "SPLITS",
    "TEMPLATES",
    "Batch",
    "Chain",
    "Chains",
    "Chat",
    "Documents",
    "Facts",
    "Inquiry",
    "Library",
    "Linked",
    "Mixture",
    "Passkey",
    "Question",
    "QuestionSource",
    "RecallSource",
    "RecallTask",
    "RetrievalRow",
    "Row",
    "Source",
    "TextCorpus",
    "TextSource",
    "build_data",
    "byte_tokenizer",
    "load_questions",
    "load_tokenizer",
    "make_sample",
    "ramp",
    "token_bytes",
]
