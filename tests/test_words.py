"""Wording that is hard for international readers and easy for a machine to find, in docstrings, comments and pages."""

import ast
import re

from tests.conftest import ROOT

CODE = [path for room in ("memlm", "kernels", "scripts", "tests") for path in sorted((ROOT / room).rglob("*.py"))]
CODE += [ROOT / "train.py", ROOT / "evaluate.py"]
NOTES = [
    path for room, end in (("configs", "yaml"), ("scripts", "sh")) for path in sorted((ROOT / room).rglob(f"*.{end}"))
]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("*/README.md")])
PAGES += sorted((ROOT / "memlm").rglob("*.md"))

HABITS = {
    r"(?<![\w./*\])`-])\.\d": "a figure begins with a point; write 0.5",
    r"(?:^|[.:;!?]\s+)Of (?!course)": "a sentence begins with 'Of'; begin with its subject",
    r"^What\b(?!.*\?)": "'what' as a noun; name the thing",
    r", for (?:it|they|there|nobody|nothing)\b": "'for' as because; write because",
    r"\b(?:[Mm]odel|[Mm]emory|[Oo]p|[Mm]ixer|[Rr]outer)s? (?:says?|said|knows?|knew)\b": "only people say and know",
}


def comments(text):
    """Comments of Python, consecutive lines as one; and parts of strings that look like comments."""
    block = []
    for line in text.splitlines():
        code, mark, comment = line.partition("#")
        if mark and not code.strip():
            block.append(comment.strip("# "))
            continue
        yield " ".join(block)
        block = []
        if mark:
            yield comment.strip("# ")
    yield " ".join(block)


def prose(path):
    text = path.read_text()
    if path.suffix == ".py":
        nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        docs = [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(text)) if isinstance(node, nodes)]
        return [*(part for doc in docs for part in doc.split("\n\n")), *comments(text)]
    if path.suffix == ".md":
        return re.sub(r"```.*?```", "", text, flags=re.S).split("\n\n")
    return re.findall(r"(?:^|\s)# (.*)$", text, re.MULTILINE)


def test_wording_is_plain():
    for path in (*CODE, *NOTES, *PAGES):
        for part in prose(path):
            line = " ".join(part.split())
            for habit, advice in HABITS.items():
                found = re.search(habit, line)
                assert not found, f"{path.relative_to(ROOT)}: {advice}: {found[0]!r} in {part!r}"
