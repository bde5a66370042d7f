"""The loops of a compiled Triton kernel: their trip counts at given arguments, and the waits in each iteration.

TTGIR has the bounds of a loop, which are computed for the arguments of a launch. PTX has the instructions. The source
line tells which loop of TTGIR a loop of PTX is. A loop that the compiler unrolled has no branch in PTX; its
instructions then count in the loop around it. Both sides of a condition count.
"""

import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

# Integer operations of TTGIR on scalars that are not negative.
_INTEGERS: dict[str, Callable[..., Any]] = {
    "addi": operator.add,
    "subi": operator.sub,
    "muli": operator.mul,
    "divsi": operator.floordiv,
    "divui": operator.floordiv,
    "ceildivsi": lambda x, y: -(-x // y),
    "remsi": operator.mod,
    "remui": operator.mod,
    "minsi": min,
    "maxsi": max,
    "andi": operator.and_,
    "ori": operator.or_,
    "xori": operator.xor,
    "shli": operator.lshift,
    "shrsi": operator.rshift,
    "select": lambda condition, x, y: x if condition else y,
    **dict.fromkeys(("extsi", "extui", "trunci", "index_cast"), lambda x: x),
}
_COMPARISONS = {name: getattr(operator, name) for name in ("lt", "le", "gt", "ge", "eq", "ne")}
_DEFINITION = re.compile(r"\s*(%[\w$.-]+)(?::\d+)? = (?:\"?)([\w.]+)\"?(.*)")
_LOOP = re.compile(r"scf\.(?:while|for (%[\w#]+) = (%\S+) to (%\S+) step (%\S+))")
# The shapes of the first factor and of the result.
_DOT = re.compile(r"(?:warp_group_dot |tc_gen5_mma |tt\.dot ).* : [^<]*<([\dx]+)x\w+, .*-> tensor<([\dx]+)xf32")
_BRANCH = re.compile(r"\bbra(?:\.uni)?\s+(\$L__BB\w+);")


class Unknown(Exception):
    """A value that depends on data."""


class Bounds(NamedTuple):
    """A loop in TTGIR: its source line, the index of the loop around it, and the names of its variable, first value,
    end and step, which a ``while`` does not have.
    """

    line: int
    parent: int | None
    names: tuple[str, ...]


class Loop(NamedTuple):
    """Instructions of a loop in PTX without those of loops inside it.

    bounds: the index of the loop in TTGIR; None: the code outside of loops. parent: the index of the loop around it in
        PTX. rounds: times that threads wait for global memory; waits: for products by wgmma
    """

    bounds: int | None
    parent: int
    barriers: int
    rounds: int
    waits: int
    instructions: int


def bounds_of(ttgir: str) -> list[Bounds]:
    """The loops of TTGIR, outer ones first."""
    locations = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", ttgir, re.MULTILINE))
    found: list[Bounds] = []
    for around, line, ends in _walk(ttgir):
        if head := _LOOP.search(line):
            found.append(Bounds(0, around, head.groups() if head[1] else ()))
        elif ends and around is not None:
            found[around] = found[around]._replace(line=_source(ends, locations))
    return found


def _walk(ttgir: str) -> Iterator[tuple[int | None, str, str | None]]:
    """Each line with the index of the loop around it, and, where that loop ends, the name of its location."""
    stack: list[tuple[int, int]] = []
    count = 0
    for line in ttgir.splitlines():
        depth = len(line) - len(line.lstrip())
        last = stack and depth == stack[-1][0] and re.match(r"\s*\} loc\((#loc\d*)\)", line)
        yield stack[-1][1] if stack else None, line, last[1] if last else None
        if last:
            stack.pop()
        if _LOOP.search(line):
            stack.append((depth, count))
            count += 1


def flops(ttgir: str, counts: list[float]) -> float:
    """FLOPs of a program's products, with the masked ones; counts: of the loops, see ``trips``."""
    loops, total = bounds_of(ttgir), 0.0
    for around, line, _ in _walk(ttgir):
        if dot := _DOT.search(line):
            of_one = 2.0 * math.prod(int(x) for x in dot[2].split("x")) * int(dot[1].rpartition("x")[2])
            while around is not None:
                of_one *= counts[around]
                around = loops[around].parent
            total += of_one
    return total


def _source(location: str, locations: dict[str, str]) -> int:
    """A source line; of inlined code that in the inner function."""
    text = locations.get(location, "")
    if place := re.match(r'".*":(\d+):\d+', text):
        return int(place[1])
    inner = re.search(r"#loc\d*", text)
    return _source(inner[0], locations) if inner else 0


class Values:
    """Integers of TTGIR, by name, in one program of a launch; a loop's variable has its first value."""

    def __init__(self, defined: dict[str, tuple[str, str]], arguments: Mapping[str, Any], program: int) -> None:
        """defined: for each name its operation and the rest of its line"""
        self.defined = defined
        self.known: dict[str, Any] = {f"%{name}": x for name, x in arguments.items() if isinstance(x, int)}
        self.program = program

    def __getitem__(self, name: str) -> int:
        if name not in self.known:
            self.known[name] = self._compute(name)
        return self.known[name]

    def _compute(self, name: str) -> int:
        if name not in self.defined:
            raise Unknown(name)
        op, rest = self.defined[name]
        kind = op.rpartition(".")[2]
        if kind == "get_program_id":
            return self.program
        if value := re.match(r"\s*(-?\d+|true|false)\b", rest) if op == "arith.constant" else None:
            return int(value[1] == "true") if value[1].isalpha() else int(value[1])
        if kind != "cmpi" and kind not in _INTEGERS:
            raise Unknown(name)
        operands = [self[x] for x in re.findall(r"%[\w$.#-]+", rest.split(" : ")[0])]
        if comparison := re.match(r"\s*[su]?(\w\w),", rest) if kind == "cmpi" else None:
            return int(_COMPARISONS[comparison[1]](*operands))
        return _INTEGERS[kind](*operands)


def trips(ttgir: str, arguments: Mapping[str, Any], programs: int, given: Iterable[float] = ()) -> list[float]:
    """The mean trip count of each loop over some programs of a launch; of inner loops in the first iteration of outer
    ones.

    given: the counts of loops whose bounds depend on data, in their order
    """
    loops, left = bounds_of(ttgir), iter(given)
    some = {i * programs // 8 + j for i in range(8) for j in range(4)} & set(range(programs)) or {0}
    defined = {m[1]: (m[2], m[3]) for m in map(_DEFINITION.match, ttgir.splitlines()) if m}
    values = [Values(defined, arguments, program) for program in sorted(some)]
    counts: list[float] = []
    for loop in loops:
        try:
            counts.append(sum(_count(loop, x) for x in values) / len(values))
        except Unknown as error:
            count = next(left, None)
            if count is None:
                raise Unknown(f"the trip count of the loop in line {loop.line} depends on {error}") from None
            counts.append(count)
    return counts


def _count(loop: Bounds, values: Values) -> int:
    if not loop.names:
        raise Unknown("a condition")
    variable, *names = loop.names
    low, high, step = (values[name] for name in names)
    values.known[variable] = low
    return max(0, -(-(high - low) // step))


def loops_of(ptx: str, bounds: list[Bounds]) -> list[Loop]:
    """The code outside of loops, and the loops of PTX, outer ones first."""
    lines = ptx.splitlines()
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"(\$L__BB\w+):", line))}
    ends: dict[int, int] = {}
    for i, line in enumerate(lines):
        if (branch := _BRANCH.search(line)) and labels[branch[1]] <= i:
            ends[labels[branch[1]]] = i
    spans = [(0, len(lines) - 1)]
    found = [Loop(None, 0, 0, 0, 0, 0)]
    for begin, end in sorted(ends.items()):
        parent = _owner(spans, begin - 1)
        index = _same(lines[begin : end + 1], bounds, found, found[parent].bounds)
        # A branch back to code that was only put there is no loop.
        if index is not None:
            spans.append((begin, end))
            found.append(Loop(index, parent, 0, 0, 0, 0))
    own: list[list[str]] = [[] for _ in spans]
    for i, line in enumerate(lines):
        own[_owner(spans, i)].append(line)
    return [Loop(*loop[:2], *_waits(text)) for loop, text in zip(found, own, strict=True)]


def _owner(spans: list[tuple[int, int]], line: int) -> int:
    return max(j for j, (begin, end) in enumerate(spans) if begin <= line <= end)


def _same(lines: list[str], bounds: list[Bounds], found: list[Loop], around: int | None) -> int | None:
    """The loop of TTGIR inside ``around`` that has a line of these, preferably one that is not found yet."""
    there = {int(m[1]) for line in lines if (m := re.match(r"\s*\.loc\s+\d+ (\d+) ", line))}
    used = {loop.bounds for loop in found}
    fit = [i for i, loop in enumerate(bounds) if loop.line in there and _inside(bounds, i, around)]
    return min(fit, key=lambda i: i in used) if fit else None


def _inside(bounds: list[Bounds], index: int, around: int | None) -> bool:
    parent = bounds[index].parent
    return around is None or parent == around or (parent is not None and _inside(bounds, parent, around))


def _waits(lines: list[str]) -> tuple[int, int, int, int]:
    """Barriers, rounds of loads, waits for wgmma, and instructions."""
    barriers = rounds = waits = instructions = 0
    pending: set[str] = set()
    for line in lines:
        text = re.sub(r"^\s*(@!?%p\d+\s+)?", "", line.partition("//")[0])
        if not re.match(r"[a-z]", text):
            continue
        instructions += 1
        barriers += text.startswith("bar")
        waits += text.startswith("wgmma.wait_group")
        registers = re.findall(r"%[a-z]+\d+", text)
        if text.startswith("ld.global"):
            loaded = re.findall(r"%[a-z]+\d+", text.partition("[")[0])
            if pending & set(registers[len(loaded) :]):
                rounds, pending = rounds + 1, set()
            pending |= set(loaded)
        elif pending & set(registers[1:]):
            if text.startswith("mov"):
                pending |= set(registers)
            else:
                rounds, pending = rounds + 1, set()
    return barriers, rounds, waits, instructions
