"""Tasks of EleutherAI's lm-eval, with the memory of the model."""

import contextlib
import copy
import functools
import importlib.metadata
import importlib.util
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from memlm.configuration import MemLMConfig
from memlm.data import Source
from memlm.evaluation.data import Examined
from memlm.evaluation.figures import Figure, Records, Topic
from memlm.evaluation.measures import Measure, Models, Table
from memlm.evaluation.report import Report
from memlm.evaluation.subject import Subject
from memlm.hub.causal import longest
from memlm.settings import require, suggest

# Rows of a forward, and draws of the bootstraps that some metrics need for a standard error.
_ROWS, _DRAWS = 16, 1000
# lm-eval's own, for a model whose trained length is unknown.
_LENGTH = 2048
_UNREACHED = re.compile(r"reach|connect|offline|resolv|cannot be accessed|max retries", re.IGNORECASE)


@dataclass(frozen=True)
class LMEval(Measure):
    """tasks: names of lm-eval's tasks, groups of tasks, or tasks of ``include_path``; [] for none
    include_path: a folder with YAMLs of your own tasks
    limit: documents of a task, or below 1 a share of them; null for all
    num_fewshot: examples in the prompt; null for the task's own number
    max_length: tokens of a window, at which lm-eval cuts a prompt from the left and a document into parts, which no
        memory crosses; null for the trained length. Without a run that is max_position_embeddings of a model of
        transformers, and 2,048 of one of memlm
    """

    name = "lm_eval"
    nothing = {}  # noqa: RUF012
    whole = False
    tasks: list | None = field(default_factory=list)
    include_path: str | None = None
    limit: int | float | None = None
    num_fewshot: int | None = None
    max_length: int | None = None

    def __post_init__(self) -> None:
        require(self.tasks is not None, "tasks=null names no task; name some, as in 'eval.tasks=[lambada_openai]'")
        require(all(isinstance(task, str) for task in self.tasks or []), f"tasks={self.tasks} must be names of tasks")
        there = self.include_path is None or Path(self.include_path).is_dir()
        require(there, f"include_path={self.include_path}: there is no such folder")
        for name, least in (("limit", 0), ("num_fewshot", -1), ("max_length", 1)):
            value = getattr(self, name)
            require(value is None or value > least, f"{name}={value} must be more than {least}, or null")

    def applies(self, sources: Mapping[str, Source]) -> bool:
        return bool(self.tasks)

    def measures(self, source: Source) -> bool:
        return False

    def check_model(self, model: PreTrainedModel) -> None:
        there = importlib.util.find_spec("lm_eval") is not None
        require(there, "needs lm-eval for eval.tasks; pip install 'lm-eval>=0.4.13'")
        most = longest(model)
        fits = most is None or self.max_length is None or self.max_length <= most
        require(fits, f"has {most} positions, eval.max_length={self.max_length} is more; lower it")

    def length(self, subject: Subject) -> int:
        """Tokens of a window."""
        config = subject.model.config
        own = None if isinstance(config, MemLMConfig) else getattr(config, "max_position_embeddings", None)
        found = self.max_length or subject.trained_length or own or _LENGTH
        return min(found, longest(subject.model) or found)

    def run(self, one: Examined, examined: Sequence[Examined]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for task in self.tasks or []:
            settings = {"task": task, "limit": self.limit, "num_fewshot": self.num_fewshot}
            settings |= {"include_path": self.include_path, "files": _files(self.include_path)}
            settings |= {"max_length": self.length(one.subject), "lm_eval": importlib.metadata.version("lm-eval")}
            found |= one.parts.measure(f"{self.name}-{task}", settings, partial(self._task, one, task)) or {}
        return found

    def _task(self, one: Examined, task: str, records: list[dict[str, Any]]) -> dict[str, Any]:
        """The results of a task, or of each task of a group and of the group; a record is a document."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        length = self.length(one.subject)
        with _quiet():
            manager = _manager(task, self.include_path)
            try:
                # lm-eval may give the tokenizer another token for padding.
                tokenizer = copy.deepcopy(one.tokenizer)
                lm = HFLM(one.subject.model, tokenizer=tokenizer, batch_size=_ROWS, max_length=length)
                out = simple_evaluate(
                    lm,
                    tasks=[task],
                    num_fewshot=self.num_fewshot,
                    limit=self.limit,
                    bootstrap_iters=_DRAWS,
                    task_manager=manager,
                )
            # Tasks, data sets and metrics of others raise anything.
            except Exception as error:
                raise ValueError(_line(task, error)) from error
        for name, samples in out["samples"].items():
            for sample in samples:
                scores = {key: float(sample[key]) for key in sample["metrics"] if np.isscalar(sample[key])}
                kept = {_metric(key, sample["filter"]): value for key, value in scores.items()}
                records.append({"task": name, "stream": sample["doc_id"], **kept})
        return {
            name: {
                "metrics": _metrics(metrics),
                "n": out["n-samples"].get(name, {}).get("effective"),
                "num_fewshot": out["n-shot"].get(name),
                "version": out["versions"].get(name),
                "max_length": length,
            }
            for name, metrics in out["results"].items()
        }

    def table(self, models: Models) -> Table:
        rows: dict[str, dict[str, str]] = {}
        for model, measured in models.items():
            for task, found in measured[self.name].items():
                for metric, figure in found["metrics"].items():
                    error = "" if figure["stderr"] is None else f" ± {figure['stderr']:.4g}"
                    label = f"{task}, {metric}" + (f" (n = {found['n']:,})" if found["n"] else "")
                    rows.setdefault(label, {})[model] = f"{figure['value']:.4g}{error}"
        return ["lm-eval (± standard error)", *models], [
            [label, *(of.get(model, "") for model in models)] for label, of in rows.items()
        ]

    def figures(self, found: Any, about: Mapping[str, Any], records: Records) -> Iterator[Figure]:
        of_tasks = [record for task in self.tasks or [] for record in records(f"{self.name}-{task}")]
        for task, result in found.items():
            settings = {key: result[key] for key in ("num_fewshot", "version", "max_length")} | {"limit": self.limit}
            topic = Topic(f"{self.name}-{task}", f"lm-eval: {task}", "value", "metric", share=False, settings=settings)
            for metric, figure in result["metrics"].items():
                value, half = figure["value"], 1.96 * (math.nan if figure["stderr"] is None else figure["stderr"])
                mine = {r["stream"]: r[metric] for r in of_tasks if r["task"] == task and metric in r}
                # Other metrics are no means over documents, such as perplexities.
                mean = bool(mine) and math.isclose(sum(mine.values()) / len(mine), value, rel_tol=1e-6, abs_tol=1e-9)
                shots = result["num_fewshot"], result["version"]
                units = {(task, *shots, document): (x, 1.0) for document, x in mine.items()} if mean else {}
                yield Figure(topic, None, metric, value, value - half, value + half, result["n"] or 0, units)

    def section(self, report: Report, models: Models, first: Subject) -> None:
        report.heading("lm-eval")
        report.table(*self.table(models))
        lengths = {name: {of["max_length"] for of in m[self.name].values()} for name, m in models.items()}
        told = (f"{max(found):,} ({name})" for name, found in lengths.items() if found)
        report.note(
            f"Tasks of EleutherAI's lm-eval, in windows of at most so many tokens: {', '.join(told)}. "
            "No memory is carried from one window to the next."
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's bars and logs, and without processes of its own."""
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        before = os.environ.get("DISABLE_MULTIPROC")
        os.environ["DISABLE_MULTIPROC"] = "1"
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
            os.environ.pop("DISABLE_MULTIPROC") if before is None else os.environ.update(DISABLE_MULTIPROC=before)


def _files(include_path: str | None) -> list[str]:
    """The files that the YAMLs of a folder name, such as data sets."""
    paths = sorted(Path(include_path).rglob("*.y*ml")) if include_path else []
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in paths]
    words = {word for text in texts for word in re.findall(r"[^\s\"'\[\]{},]{1,1024}", text)}
    return sorted(word for word in words if os.path.isfile(word))


def _manager(task: str, include_path: str | None) -> Any:
    """lm-eval's index of tasks. Raises ValueError if it has not this one."""
    # Its own thousands of tasks take seconds.
    own = _index(include_path, False) if include_path else None
    if own is not None and task in own.all_tasks:
        return own
    all_tasks = _index(include_path, True)
    fix = suggest(task, all_tasks.all_tasks, "'python -m lm_eval ls tasks' lists all; eval.include_path adds yours")
    require(task in all_tasks.all_tasks, f"eval.tasks: {task!r} is unknown; {fix}")
    return all_tasks


@functools.cache
def _index(include_path: str | None, defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=defaults)


def _line(task: str, error: Exception) -> str:
    """An error of lm-eval in one line."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    lines = str(error).strip().splitlines()
    told = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    offline = any(isinstance(x, OSError) or type(x).__name__.startswith("Dataset") for x in chain)
    if offline and any(_UNREACHED.search(str(x)) for x in chain):
        fix = "run it once with a network, or name tasks of local files with eval.include_path"
        return f"eval.tasks: {task}: its data set is not here and cannot be downloaded ({told:.120}); {fix}"
    return f"eval.tasks: {task}: lm-eval stopped with {told}"


def _metric(name: str, of_filter: str) -> str:
    return name if of_filter == "none" else f"{name} ({of_filter})"


def _metrics(results: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """lm-eval's keys are ``acc,none`` and ``acc_stderr,none``."""
    found = {}
    for key, value in results.items():
        name, comma, of_filter = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = results.get(f"{name}_stderr,{of_filter}")
        stderr = float(error) if isinstance(error, int | float) else None
        found[_metric(name, of_filter)] = {"value": float(value), "stderr": stderr}
    return found
