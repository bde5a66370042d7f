"""Manifests: the files of a source, so that a run that continues, or an evaluation, can check they are the same."""

from collections.abc import Iterable, Mapping
from typing import Any

from .disk_cache import Content
from .find import counted


def file_entry(name: str, content: Content) -> dict[str, Any]:
    return {"path": name, "sha256": content.sha256, "bytes": content.num_bytes}


def left_out(manifest: Mapping[str, Any]) -> str:
    """A summary of the files that were found but not read, or hold no text, such as "2 hidden"; empty if there are
    none.
    """
    empty = ["empty" for file in manifest["files"] if file.get("splits") == []]
    return counted([*(file["reason"] for file in manifest["left_out"]), *empty])


def check_manifest(source: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ValueError, with the source and the first files, unless they equal those of an earlier manifest."""
    try:
        then, today = ([(file["path"], file["sha256"]) for file in m["files"]] for m in (before, now))
        others = [(key, before[key], now[key]) for key in ("tokenizer", "splits") if key in now]
    except (KeyError, TypeError):
        raise ValueError(f"data.sources.{source}: the run's manifest is damaged; take another checkpoint") from None
    fix = "restore them, or train anew under another name=..."
    if then != today:
        raise ValueError(f"data.sources.{source}: its files are not those of the run: {_differ(then, today)}; {fix}")
    for key, old, new in others:
        if old != new:
            raise ValueError(f"data.sources.{source}: {key} {new} of the same files, but the run has {old}; {fix}")


def _differ(then: Iterable[tuple[str, str]], today: Iterable[tuple[str, str]]) -> str:
    before, now = dict(then), dict(today)
    parts = []
    for names, told in (
        ([name for name in before if name in now and now[name] != before[name]], "changed"),
        ([name for name in before if name not in now], "missing"),
        ([name for name in now if name not in before], "new"),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"{', '.join(names[:3])}{more} {told}")
    return "; ".join(parts) or "their order differs"
