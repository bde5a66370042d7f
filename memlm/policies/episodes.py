"""EpiCache: several caches of one text, each for an episode; a question is answered from the nearest.

B streams, T tokens, W windows, E episodes, P tokens of a prompt, D hidden.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from memlm.policies import queries
from memlm.policies.kinds import EpiCache
from memlm.policies.reader import PolicyReader
from memlm.reader import Reader


class EpisodeReader(Reader):
    """Streams that are read once for each of their episodes, when the first question comes.

    An episode is a cluster of windows of the text, by the means of their tokens' embeddings. Its cache keeps the
    entries to which the windows in the middle of the cluster attend. A copy for a question goes on from the cache
    whose centroid is nearest to the question.

    The text itself is kept, since a later part changes the clusters. The text and the centroids are not part of the
    budget, which all caches of a stream share.
    """

    def __init__(self, model: PreTrainedModel, policy: EpiCache) -> None:
        super().__init__(model)
        self.policy = policy
        # Wrong settings end here, not at the first question.
        queries.check(model)
        self.episodes = PolicyReader(model, policy)
        self.text_BT: Tensor | None = None
        self.centroids_BED: Tensor | None = None

    @torch.no_grad()
    def __call__(self, ids_BT: Tensor, keep: int = 1) -> Tensor:
        """Read on. Returns no logits, [B, 0, 0]: only copies for questions predict."""
        self.text_BT = ids_BT if self.text_BT is None else torch.cat([self.text_BT, ids_BT], 1)
        self.tokens += ids_BT.shape[1]
        return torch.zeros(len(ids_BT), 0, 0, device=ids_BT.device)

    def _read_episodes(self) -> PolicyReader:
        """All episodes as streams of one reader, stream b of episode e at e * B + b."""
        made, text_BT = self.episodes, self.text_BT
        if text_BT is None or (made.tokens == self.tokens and made.model is self.model):
            return made
        size, count = min(self.policy.window, self.tokens), self.policy.caches
        windows_BWT = text_BT[:, : self.tokens // size * size].unflatten(1, (-1, size))
        vectors_BWD = self._embedded(windows_BWT)
        self.centroids_BED = clustered(vectors_BWD, count)
        near_BEW = torch.einsum("bed,bwd->bew", self.centroids_BED, vectors_BWD)
        nearest = min(self.policy.nearest, near_BEW.shape[2])
        index_BEN = near_BEW.argsort(dim=2, descending=True, stable=True)[..., :nearest].sort(2).values
        rows_B = torch.arange(len(text_BT), device=text_BT.device)
        prompts_EBP = windows_BWT[rows_B[:, None, None], index_BEN].flatten(2).transpose(0, 1)
        made = PolicyReader(self.model, self.policy)
        made.prompt_BP = prompts_EBP.flatten(0, 1)
        made(text_BT.repeat(count, 1))
        self.episodes = made
        return made

    def _embedded(self, ids: Tensor) -> Tensor:
        """Unit vectors [..., D] of tokens [..., T]."""
        embedded = self.model.get_input_embeddings()(ids)
        return F.normalize(embedded.to(torch.promote_types(embedded.dtype, torch.float32)).mean(-2), dim=-1)

    @torch.no_grad()
    def fork(self, rows: Tensor | None = None, question_BT: Tensor | None = None) -> Reader:  # type: ignore[override]
        """A copy that answers a question, from the episode that each stream's question chooses."""
        assert question_BT is not None, "episodes are chosen by a question"
        made = self._read_episodes()
        if self.centroids_BED is None:
            return made.fork()
        rows = torch.arange(len(question_BT), device=question_BT.device) if rows is None else rows
        near_BE = torch.einsum("bed,bd->be", self.centroids_BED[rows], self._embedded(question_BT))
        return made.fork(near_BE.argmax(1) * len(self.centroids_BED) + rows)

    @torch.no_grad()
    def nbytes(self) -> int:
        return self._read_episodes().nbytes()


def clustered(vectors_BWD: Tensor, count: int, steps: int = 10) -> Tensor:
    """Centroids [B, count, D] of k-means. It begins with the first window, then each time with the one that is
    farthest from all centroids, so that it draws nothing.
    """
    rows_B = torch.arange(len(vectors_BWD), device=vectors_BWD.device)
    centroids_BED = vectors_BWD[:, :1]
    for _ in range(count - 1):
        far_B = torch.cdist(vectors_BWD, centroids_BED).amin(2).argmax(1)
        centroids_BED = torch.cat([centroids_BED, vectors_BWD[rows_B, far_B][:, None]], 1)
    for _ in range(steps):
        of_BW = torch.cdist(vectors_BWD, centroids_BED).argmin(2)
        member_BWE = F.one_hot(of_BW, count).to(vectors_BWD.dtype)
        size_BE = member_BWE.sum(1)
        sum_BED = torch.einsum("bwe,bwd->bed", member_BWE, vectors_BWD)
        mean_BED = sum_BED / size_BE.clamp(min=1)[..., None]
        centroids_BED = torch.where(size_BE[..., None] > 0, mean_BED, centroids_BED)
    return centroids_BED
