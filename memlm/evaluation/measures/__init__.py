"""The measures of ``evaluate.py``. A new one is a module here, and its settings in a YAML of ``configs/eval``.

A module holds a class that derives from ``Measure``. Its fields are its settings, keys of the ``eval`` group.

Files:

    asked               tasks of events: texts that are read, and questions about them
    bank                questions to a bank, over the number of its documents
    conflict            weights against memory: which part decides
    inside              one text token by token
    interleaved         questions answered by reading on in a bank
    lm_eval             tasks of EleutherAI's lm-eval
    needles             passkeys over length and depth
    recall              recall tasks over length
    text                perplexity of text, with the memory carried, reset and silenced
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, ClassVar

from transformers import PreTrainedModel

from memlm import plugins
from memlm.data import Source
from memlm.evaluation.data import Examined
from memlm.evaluation.figures import Figure, Records
from memlm.evaluation.report import Report
from memlm.evaluation.subject import Subject
from memlm.settings import build_config, require, suggest

# Header and rows.
Table = tuple[list[str], list[list[str]]]
Models = Mapping[str, Mapping[str, Any]]
# Upper bounds: on rows, questions or documents, and on the tokens of one forward.
MOST, LONGEST = 10**6, 2**24


class Measure:
    """One measure. Derive a frozen dataclass whose fields are its settings; measures may share a setting.

    name: the key of its results in results.json
    nothing: its result for data without a source that it measures
    whole: whether its result is kept as one part; otherwise ``run`` keeps its parts by ``one.parts.measure``
    apart: the reason why runs are not compared by it; of no meaning for a measure with ``figures``
    """

    name: ClassVar[str]
    nothing: ClassVar[Any] = []
    whole: ClassVar[bool] = True
    apart: ClassVar[str] = "it has no figures"

    def measures(self, source: Source) -> bool:
        """Whether it measures a source, with these settings."""
        raise NotImplementedError

    def applies(self, sources: Mapping[str, Source]) -> bool:
        """Whether there is anything to measure, with these settings."""
        return any(map(self.measures, sources.values()))

    def check(self, sources: Mapping[str, Source]) -> None:
        """Raise ValueError if the settings do not fit the data."""

    def check_model(self, model: PreTrainedModel) -> None:
        """Raise ValueError if it cannot measure a model; the message follows the model's name."""

    def tokens(self, sources: Mapping[str, Source]) -> int:
        """The tokens of its longest stream; a table of positions may be shorter."""
        return 0

    def cost(self, sources: Mapping[str, Source]) -> int:
        """The tokens that a model reads for it, roughly; 0 if unknown."""
        return 0

    def notes(self, sources: Mapping[str, Source]) -> list[str]:
        """Notes for readers of the results, one line each."""
        return []

    def run(self, one: Examined, examined: Sequence[Examined]) -> Any:
        """JSON-ready results of one model; examined: all models of the evaluation."""
        raise NotImplementedError

    def table(self, models: Models) -> Table | None:
        """The table for screen and page, or None. ``models[name][self.name]`` is the result of ``run``; models without
        any are left out.

        A measure with several has ``tables`` instead.
        """
        raise NotImplementedError

    def tables(self, models: Models) -> dict[str, Table]:
        """All its tables, by name."""
        table = self.table(models)
        return {} if table is None else {self.name: table}

    def figures(self, found: Any, about: Mapping[str, Any], records: Records) -> Iterator[Figure]:
        """The figures by which runs are compared (``evaluate.py compare=...``).

        found: the result of ``run``; records: of a part of it, by name
        about: what else determines the texts: ``seed``, ``corpora`` and ``sources`` by name, and ``tokenizer``
        """
        return iter(())

    def section(self, report: Report, models: Models, first: Subject) -> None:
        """Add heading, table, pictures and notes to the page; first: the first of ``models``."""
        raise NotImplementedError


def measures(settings: Mapping[str, Any]) -> list[Measure]:
    """All measures with the settings of the ``eval`` group, and measures of installed packages that it names.

    The settings of a package's measure are under the name of its entry point, ``eval.surprise={rows: 16}``.
    Raises ValueError with the key, the value and a fix.
    """
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    found = [kind for module in modules for kind in _measures_of(module)]
    fields = {kind: [field.name for field in dataclasses.fields(kind)] for kind in found}  # type: ignore[arg-type]
    own = list(dict.fromkeys(name for names in fields.values() for name in names))
    known, outside = [*own, *plugins.names("memlm.measure")], []
    for key, value in settings.items():
        require(key in known, f"eval.{key}={value!r} is not a setting; {suggest(str(key), known)}")
        if module := plugins.load("memlm.measure", key, own, f"eval.{key}={value!r}"):
            of_key = [kind for kind in _measures_of(module) if kind.name == key]
            free = len(of_key) == 1 and key not in [kind.name for kind in found]
            require(free, f"eval.{key}: {module.__name__} must have one Measure, and its name={key!r} must be new")
            require(isinstance(value, Mapping), f"eval.{key}={value!r} must be its settings, {{key: value}}")
            outside.append(build_config(of_key[0], dict(value), f"eval.{key}"))
    given = {kind: {key: settings[key] for key in names if key in settings} for kind, names in fields.items()}
    return [*(build_config(kind, values, "eval") for kind, values in given.items()), *outside]


def _measures_of(module: ModuleType) -> list[type[Measure]]:
    own = [x for x in vars(module).values() if isinstance(x, type) and x.__module__ == module.__name__]
    return [x for x in own if issubclass(x, Measure)]


def check_range(settings: Any, **least: int) -> None:
    """Raise ValueError unless each setting lies between its least value and a reasonable maximum."""
    for name, low in least.items():
        value, most = getattr(settings, name), LONGEST if name.endswith("_length") else MOST
        require(low <= value <= most, f"{name}={value} must lie in {low}..{most}")


def check_counts(settings: Any, name: str, most: int = MOST) -> None:
    """Raise ValueError unless a setting is a list of whole numbers."""
    values = getattr(settings, name)
    whole = all(type(n) is int and 1 <= n <= most for n in values)
    require(whole, f"{name}={values} must be whole numbers in 1..{most}")


def by_source(models: Models, name: str) -> dict[str, Any]:
    """The results of each model and source; sources are named if there are several."""
    return {
        f"{model}, {source}" if len(results[name]) > 1 else model: measured
        for model, results in models.items()
        for source, measured in results[name].items()
    }


def plain(results: Iterable) -> list[dict]:
    """Dataclasses as JSON-ready dicts."""
    return [dataclasses.asdict(r) for r in results]
