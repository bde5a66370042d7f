"""A plugin of pytest for gpu_suite.sh: results are written as they come, and backward passes of memories go first.

    GPU_RECORDS=results.jsonl python -m pytest -p gpu_tests tests/kernels
    GPU_RECORDS=results.jsonl GPU_AGAIN=1 DISABLE_MMA_V3=1 python -m pytest -p gpu_tests tests/kernels

The second command runs the tests that failed in the first. GPU_DRY=1 takes one test, and runs it again in any case.
"""

import json
import os
from pathlib import Path
from typing import Any

# Parts of names, what is most likely wrong first: long chains of products, in 16 bits.
ORDER = ("memor", "delta", "linear", "recurrence", "", "inputs", "outside")
SETTINGS = ("DISABLE_MMA_V3", "TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")
OUT = Path(os.environ.get("GPU_RECORDS", "results.jsonl"))
DRY, AGAIN = os.environ.get("GPU_DRY") == "1", os.environ.get("GPU_AGAIN") == "1"


def rank(name: str) -> tuple[int, bool]:
    file, _, test = name.partition("::")
    if "inputs" in file or "outside" in file:
        return len(ORDER), False
    return next(i for i, part in enumerate(ORDER) if part in test), not ("dtype" in test or "16" in test)


def failed() -> set[str]:
    """The tests that have failed; in a dry run, all."""
    lines = [json.loads(line) for line in OUT.read_text().splitlines()] if OUT.exists() else []
    return {x["test"] for x in lines if x.get("part") == "tests" and (DRY or x["outcome"] == "failed")}


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    items.sort(key=lambda item: rank(item.nodeid))
    if AGAIN:
        wanted = failed()
        items[:] = [item for item in items if item.nodeid in wanted]
    elif DRY:
        del items[1:]


def pytest_runtest_logreport(report: Any) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ or (report.when != "call" and report.outcome != "failed"):
        return
    import gpu_records

    about = {"part": "tests again" if AGAIN else "tests", "test": report.nodeid, "outcome": report.outcome}
    about |= {name: os.environ[name] for name in SETTINGS if name in os.environ}
    said = str(report.longrepr).strip().splitlines()[-1][:300] if report.outcome == "failed" else ""
    gpu_records.write(OUT, about | {"seconds": round(report.duration, 2)} | ({"error": said} if said else {}))
