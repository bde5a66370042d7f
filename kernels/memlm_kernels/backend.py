"""Which implementation of an op runs: ``auto``, ``reference`` (plain PyTorch, any device) or ``triton``."""

import logging

logger = logging.getLogger(__name__)
_announced: set[tuple[str, str]] = set()


def choose(op: str, backend: str, available: tuple[str, ...]) -> str:
    """Resolve ``backend`` for ``op``; ``available`` lists what can run here, fastest first.

    ``auto`` takes the first of ``available`` and logs its choice once for each op.
    Raises ValueError for a backend that cannot run: there is no silent fallback.
    """
    if backend == "auto":
        backend = available[0]
        if (op, backend) not in _announced:
            _announced.add((op, backend))
            logger.info("%s: backend %s", op, backend)
    elif backend not in available:
        raise ValueError(f"{op}: backend={backend!r} cannot run here; use one of auto, {', '.join(available)}")
    return backend
