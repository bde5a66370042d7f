"""RULER (arXiv:2404.06654) with any tokenizer: 13 tasks on texts of any length.

Templates, numbers of needles, scorers and tokens to generate are those of its published generator,
github.com/NVIDIA/RULER at c3f5e3b. A length counts the prompt, the beginning of the answer and the tokens to
generate, in the model's own tokens, as there. It differs in three points:

- Texts have exactly the asked length: the last sentence of a haystack, or the last item of a list, may be cut. There
  it is left out.
- Haystacks and words are ours: ``haystack`` names the prose (there, Paul Graham's essays), and words are those of
  ``memlm.evaluation.tasks.words``. The keys of a text are different.
- Keys and values are drawn anew for each text, by the task, its length and its number.

Files: ``ruler_needles``, ``ruler_lists`` and ``ruler_qa`` have the tasks.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import numpy as np

from memlm.evaluation.events import Ask, Read, Stream
from memlm.evaluation.tasks import Setting, Task, View
from memlm.evaluation.tasks.haystack import essay, files
from memlm.evaluation.tasks.ruler_lists import CommonWords, FrequentWords
from memlm.evaluation.tasks.ruler_needles import HiddenNeedles, VariableChain
from memlm.evaluation.tasks.ruler_prompt import Kind, Prompt
from memlm.evaluation.tasks.ruler_qa import FORMS, AskedDocuments
from memlm.settings import require, suggest

KINDS: Mapping[str, Kind] = {
    "niah_single_1": HiddenNeedles("noise"),
    "niah_single_2": HiddenNeedles("essay"),
    "niah_single_3": HiddenNeedles("essay", value="uuids"),
    "niah_multikey_1": HiddenNeedles("essay", keys=4),
    "niah_multikey_2": HiddenNeedles("needle"),
    "niah_multikey_3": HiddenNeedles("needle", key="uuids", value="uuids"),
    "niah_multivalue": HiddenNeedles("essay", values=4),
    "niah_multiquery": HiddenNeedles("essay", keys=4, queries=4),
    "vt": VariableChain(),
    "cwe": CommonWords(),
    "fwe": FrequentWords(),
}
# Forms of the files of tasks that need some.
_FILES = {"qa_1": "squad", "qa_2": "hotpotqa"}


@dataclass(frozen=True, kw_only=True)
class Ruler(Task):
    """tasks: names of RULER's tasks; null for all that have their files
    haystack: a text file, or a folder of ``*.txt``; null for sentences made by rule
    squad, hotpotqa: JSON files for qa_1 and qa_2
    """

    name = "ruler"
    title = "RULER"
    note = (
        "The model reads a long text and generates an answer to a question. The score is RULER's: the share of the "
        "expected strings in the answer. A guesser has 0; one that repeats the end of the text finds words of cwe and "
        "fwe, which stand everywhere."
    )
    down = "task"
    tasks: list | None = None
    haystack: str | None = None
    squad: str | None = None
    hotpotqa: str | None = None

    def __post_init__(self) -> None:
        names, asked = [*KINDS, *_FILES], self.tasks or []
        require(self.tasks != [], "tasks=[] is empty; leave it out for all")
        for task in asked:
            require(task in names, f"tasks: {task!r} is unknown; {suggest(str(task), names)}")
            form = _FILES.get(task)
            given = form is None or getattr(self, form) is not None
            require(given, f"{form}=null: {task} needs a file; name {FORMS.get(form or '')}")
        if self.haystack is not None:
            files(self.haystack)

    @cached_property
    def kinds(self) -> dict[str, Kind]:
        """The chosen tasks, by name."""
        paths = {name: (form, getattr(self, form)) for name, form in _FILES.items()}
        found = {**KINDS, **{name: AskedDocuments(*pair) for name, pair in paths.items() if pair[1] is not None}}
        return found if self.tasks is None else {name: found[name] for name in self.tasks}

    def cost(self) -> int:
        return super().cost() * len(self.kinds)

    def views(self) -> Sequence[View]:
        return [View(down="task"), View(name="mean", label="mean of the tasks")]

    def kinds_apart(self) -> Mapping[str, Self]:
        return {name: replace(self, tasks=[name]) for name in self.kinds}

    def check(self, setting: Setting) -> None:
        length = min(self.lengths)
        for task, kind in self.kinds.items():
            for row in range(self.rows):
                prompt = self._prompt(setting, task, length, row)
                self._check_symbols(setting, task, prompt)
                least = self._around(setting, kind, prompt) + prompt.least
                require(
                    length >= least,
                    f"eval.ask.ruler: lengths={length} is too short for {task}: with this tokenizer it needs {least:,}"
                    f" tokens, of which {kind.generated} are generated; raise eval.lengths, or leave it out of tasks",
                )

    def _check_symbols(self, setting: Setting, task: str, prompt: Prompt) -> None:
        where = f"eval.ask.ruler.tasks: {task}"
        setting.check_text(f"{prompt.intro}{prompt.sample} {prompt.question}{prompt.reply}", where)
        # Decoding puts spaces beside some signs of words.
        answer = setting.decode(setting.pieces([prompt.reply])[0])
        score = self.kinds[task].score(answer, prompt.answers)
        require(
            score == 1.0,
            f"{where}: the tokenizer decodes the right answer {prompt.reply!r} as {answer!r}; leave it out",
        )

    def streams(self, setting: Setting) -> Iterator[Stream]:
        for length in self.lengths:
            for task in self.kinds:
                for row in range(self.rows):
                    yield self._stream(setting, task, length, row)

    def _stream(self, setting: Setting, task: str, length: int, row: int) -> Stream:
        kind, prompt = self.kinds[task], self._prompt(setting, task, length, row)
        room = length - self._around(setting, kind, prompt)
        ids = np.concatenate([setting.start, setting.encode(prompt.intro), prompt.context(room)])
        question, reply = setting.pieces([prompt.question, prompt.reply])
        judge = _judge(setting, kind, prompt.answers)
        tag = {"length": length, "task": task, "guesses": {"repeats the end": judge(ids[-kind.generated :])}}
        return [Read(ids), Ask(question, [reply], tag, judge, kind.generated)]

    def _prompt(self, setting: Setting, task: str, length: int, row: int) -> Prompt:
        rng = setting.rng("ruler", task, length, row)
        return self.kinds[task].prompt(setting, essay(setting, self.haystack), rng, length, row)

    def _around(self, setting: Setting, kind: Kind, prompt: Prompt) -> int:
        """Tokens of all but the context."""
        outer = len(setting.start) + len(setting.encode(prompt.intro)) + len(setting.pieces([prompt.question])[0])
        return outer + kind.generated


def _judge(setting: Setting, kind: Kind, answers: Sequence[str]) -> Callable[[np.ndarray], float]:
    return lambda ids: kind.score(setting.decode(ids), answers)
