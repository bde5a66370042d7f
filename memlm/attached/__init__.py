"""A memory beside the attention of any decoder of transformers: y = attention(x) + gate * memory(norm(x)).

The model keeps its class, its configuration and the names of its parameters. Three kinds of hooks do the work:

    before the decoder         reads padding, packing and positions once, and hands a ``Call`` down as a keyword
    after an attention         adds the memory's output; its new state goes into the ``Call``
    after the decoder          stores all states in the model's own cache, at once

Files:

    model               ``attach`` and ``detach``
    layers              where a decoder of transformers has its layers and their attention
    hooks               the hooks
    call                a forward of the decoder: its rows, its states, its auxiliary losses
    cache               the states as one more element of transformers' caches; ``fork``
    window              the backbone's attention cut to a window and first tokens
    save, load          memories in files
"""

from memlm.attached.cache import fork
from memlm.attached.layers import of
from memlm.attached.load import backbone_of, from_pretrained, load_memory
from memlm.attached.model import attach, detach
from memlm.attached.save import save_memory

__all__ = ["attach", "backbone_of", "detach", "fork", "from_pretrained", "load_memory", "of", "save_memory"]
