"""A look at a model's memories while it reads one stream: norms, routed memories, chosen chunks.

T tokens, D hidden, M memories, J choices of a token, C chunks.
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from memlm.memory import chunk_sparse, mom, msa, parts
from memlm.memory.base import MixerOutput, SequenceMixer
from memlm.memory.rows import Rows
from memlm.memory.state import State, leaves
from memlm.side import is_own


class Insight:
    """Figures of each layer, by its name, in the order of the tokens.

    outputs: norm of the mixer's output at each token
    states: norm of the state after each call
    memories: the memories of each token, likeliest first (mixture of memories)
    chunks: for each token, the numbers of the chunks that it chose (chunk_sparse, msa); msa's tokens are those outside
        documents, and its chunks those of the documents in their order
    sizes: tokens of a chunk
    """

    def __init__(self) -> None:
        self.outputs: dict[str, list[float]] = {}
        self.states: dict[str, list[float]] = {}
        self.memories: dict[str, list[list[int]]] = {}
        self.chunks: dict[str, list[list[int]]] = {}
        self.sizes: dict[str, int] = {}
        # With a limit, chunks are counted in the state: so many of the text come before its first.
        self._before: dict[str, int] = {}

    @contextmanager
    def of(self, model: nn.Module) -> Iterator["Insight"]:
        """Insight a model whose calls have one row each."""
        with ExitStack() as stack:
            for name, mixer in _mixers(model).items():
                watched: list[tuple[nn.Module, Any]] = [(mixer, partial(self._mixed, name))]
                if isinstance(mixer, mom.Mixer):
                    watched.append((mixer.router, partial(self._routed, name, mixer)))
                if isinstance(mixer, chunk_sparse.Mixer | msa.Mixer) and hasattr(mixer, "choice"):
                    settings = mixer.msa if isinstance(mixer, msa.Mixer) else mixer.chunked
                    self.sizes[name] = settings.chunk_size
                    watched.append((mixer.choice, partial(self._chosen, name)))
                    if getattr(settings, "max_chunks", 0):
                        stack.callback(mixer.register_forward_pre_hook(partial(self._begins, name)).remove)
                for module, see in watched:
                    stack.callback(module.register_forward_hook(see).remove)
            yield self

    def _mixed(self, name: str, module: nn.Module, inputs: Any, out: MixerOutput) -> None:
        self.outputs.setdefault(name, []).extend(torch.linalg.vector_norm(out.y_BTD[0].float(), dim=-1).tolist())
        squares = [x.float().square().sum() for x in leaves(out.state) if x.is_floating_point() and x.numel()]
        if squares:
            self.states.setdefault(name, []).append(float(sum(squares, torch.zeros_like(squares[0])).sqrt()))

    def _routed(self, name: str, mixer: mom.Mixer, module: nn.Module, inputs: Any, logits_BTM: Tensor) -> None:
        scores_BTM = logits_BTM.float().softmax(-1)
        if mixer.config.balance_bias:
            scores_BTM = scores_BTM + mixer.bias
        self.memories.setdefault(name, []).extend(parts.top_choices(scores_BTM, mixer.config.top_k)[0].tolist())

    def _begins(self, name: str, mixer: chunk_sparse.Mixer, inputs: tuple[Tensor, State, Rows]) -> None:
        rows, config = inputs[2], mixer.chunked
        read = int(rows.before_B[0]) // config.chunk_size
        # Without a start that the host knows, a state has places for chunks that were never read.
        self._before[name] = read - (config.chunks_kept if rows.start is None else min(read, config.chunks_kept))

    def _chosen(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...], out: Any) -> None:
        chosen, *document = (x[0] for x in inputs)
        if document:
            # Chunks of the chosen documents, which are counted from 1.
            chosen = (chosen[:, None] == document[0][:, None] + 1).any(-1)
        if chosen.dtype == torch.bool:
            found = [row.nonzero().flatten().tolist() for row in chosen]
        else:
            # Groups of heads choose on their own; chunks are counted from 1, and 0 is none.
            first = self._before.get(name, 0) - 1
            found = [sorted({n + first for n in row.flatten().tolist() if n > 0}) for row in chosen]
        self.chunks.setdefault(name, []).extend(found)


def _mixers(model: nn.Module) -> dict[str, SequenceMixer]:
    """The outermost mixers, by the number of their layer."""
    found: dict[str, SequenceMixer] = {}
    paths: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, SequenceMixer) and not any(path.startswith(f"{outer}.") for outer in paths):
            paths.append(path)
            number, where = re.search(r"\.(\d+)\.", path), "side layer" if is_own(path) else "layer"
            found[f"{where} {number[1]}" if number else path] = module
    return found
