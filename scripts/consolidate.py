#!/usr/bin/env python
"""Add whole weights to a checkpoint that is in parts, so that ``from_pretrained`` and evaluate.py read it.

    python scripts/consolidate.py runs/mine/titans_mag-seed0  # the newest checkpoint of a run
    python scripts/consolidate.py runs/mine/titans_mag-seed0/checkpoints/step_000200

Processes that share parameters write parts (hardware=fsdp2, hardware=hsdp). A run does this itself at its end.
"""

import argparse
import sys
from pathlib import Path

from memlm.training import checkpoint
from memlm.training.sharded_checkpoint import consolidate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a run directory, or a checkpoint")
    source = parser.parse_args().source
    try:
        folder = checkpoint.newest_whole(source)[0] or source
        consolidate(folder)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    print(folder)


if __name__ == "__main__":
    main()
