"""lm-eval's command line for models with a memory.

    python -m memlm.lm_eval run --model memlm --model_args pretrained=DIR,max_length=4096 --tasks lambada_openai

All options are lm-eval's own. ``--model hf`` would evaluate the backbone of an attached memory alone.
"""

import sys
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

import memlm
from memlm.attached import backbone_of


class NoModelError(ValueError):
    """A model that cannot be loaded."""


@register_model("memlm")
class MemoryLM(HFLM):
    """lm-eval's model of transformers, with its memory.

    pretrained: as in ``memlm.from_pretrained``, but not a name on the hub of a memory alone; or a model
    memory: a folder of ``memlm.save_memory``, whose backbone is ``pretrained``
    """

    # lm-eval calls its from_pretrained alone.
    AUTO_MODEL_CLASS = memlm

    def __init__(self, pretrained: Any, **kwargs: Any) -> None:
        try:
            if isinstance(pretrained, str) and (backbone := backbone_of(pretrained)):
                kwargs, pretrained = {"memory": pretrained, **kwargs}, backbone
            super().__init__(pretrained, **kwargs)
        except (OSError, ValueError) as error:
            raise NoModelError(str(error)) from error

    def _create_model(self, pretrained: str, memory: str | None = None, **kwargs: Any) -> None:
        super()._create_model(pretrained, **kwargs)
        if memory is not None:
            memlm.load_memory(self._model, memory)


def main() -> None:
    """lm-eval's command line, which ends in one line if there is no model."""
    try:
        cli_evaluate()
    except NoModelError as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
