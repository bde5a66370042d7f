"""The rooms of the repository: which may import which, and names that must not collide."""

import ast
import functools
import re
import sys
import tomllib
from collections import Counter
from itertools import chain

from tests.conftest import ROOT

# A module may import from the rooms listed for its own room, which the longest prefix decides.
ROOMS = {
    "memlm_kernels": set(),
    "memlm.files": set(),
    "memlm.fingerprint": set(),
    # Settings, roles and files are below every room.
    "memlm.settings": set(),
    "memlm.versions": set(),
    "memlm.plugins": {"memlm.settings"},
    "memlm.roles": set(),
    "memlm.data": {"memlm.files", "memlm.settings", "memlm.plugins", "memlm.roles"},
    "memlm.layers": {"memlm_kernels"},
    "memlm.memory": {"memlm_kernels", "memlm.settings", "memlm.plugins", "memlm.roles", "memlm.layers"},
    "memlm.side": {"memlm_kernels", "memlm.settings", "memlm.layers", "memlm.memory"},
    "memlm.configuration": {"memlm.settings", "memlm.memory", "memlm.side"},
    "memlm.cache": {"memlm.files", "memlm.fingerprint", "memlm.memory"},
    "memlm.layer_calls": {"memlm.memory", "memlm.cache"},
    "memlm.loss": set(),
    "memlm.memory_layer": {"memlm.settings", "memlm.roles", "memlm.memory"},
    "memlm.generation": {"memlm.cache", "memlm.roles", "memlm.versions"},
    "memlm.card": {"memlm.files", "memlm.memory"},
    "memlm.modeling": {
        "memlm.roles",
        "memlm.card",
        "memlm.files",
        "memlm.layers",
        "memlm.memory",
        "memlm.configuration",
        "memlm.cache",
        "memlm.generation",
        "memlm.layer_calls",
        "memlm.loss",
        "memlm.side",
        "memlm.versions",
    },
    "memlm.flops": {"memlm_kernels", "memlm.memory", "memlm.cache", "memlm.configuration", "memlm.modeling"},
    "memlm.bank": {
        "memlm_kernels",
        "memlm.files",
        "memlm.fingerprint",
        "memlm.settings",
        "memlm.roles",
        "memlm.data",
        "memlm.memory",
        "memlm.configuration",
        "memlm.cache",
        "memlm.modeling",
    },
    "memlm.interleave": {"memlm.settings", "memlm.roles", "memlm.data", "memlm.memory", "memlm.cache", "memlm.bank"},
    "memlm.editing": {"memlm_kernels", "memlm.settings", "memlm.data"},
    "memlm.attached": {
        "memlm.configuration",
        "memlm.card",
        "memlm.files",
        "memlm.fingerprint",
        "memlm.settings",
        "memlm.layers",
        "memlm.memory",
        "memlm.cache",
        "memlm.loss",
        "memlm.versions",
    },
    "memlm": {
        "memlm.attached",
        "memlm.memory_layer",
        "memlm.bank",
        "memlm.configuration",
        "memlm.cache",
        "memlm.interleave",
        "memlm.loss",
        "memlm.modeling",
    },
}
OUTER = {"memlm.hub", "memlm.reader", "memlm.policies", "memlm.training"} | {
    "memlm.evaluation",
    "memlm.cli",
    "memlm.lm_eval",
}
OUTSIDE = {
    "memlm_kernels": {"torch", "triton", "fla"},
    "memlm.data": {"torch", "numpy", "transformers", "tokenizers", "pyarrow", "datasets", "huggingface_hub"},
    "memlm.memory": {"torch", "transformers", "einops"},
}


def files():
    for base in ("memlm", "kernels/memlm_kernels"):
        for path in sorted((ROOT / base).rglob("*.py")):
            parts = path.relative_to(ROOT / ("kernels" if base.startswith("kernels") else ".")).with_suffix("").parts
            yield path, ".".join(p for p in parts if p != "__init__")


def room(module: str) -> str:
    known = [r for r in [*ROOMS, *OUTER] if module == r or module.startswith(f"{r}.")]
    return max(known, key=len)


@functools.cache
def tree(path):
    return ast.parse(path.read_text())


@functools.cache
def imports(path, module):
    return list(found_imports(path, module))


def found_imports(path, module):
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] + "." if node.level else ""
            name = f"{base}{node.module or ''}".rstrip(".")
            # ``from memlm.memory import attention`` names a module too.
            inner = [f"{name}.{alias.name}" for alias in node.names]
            yield from inner if name in ROOMS else (name, *filter(is_file, inner))


def is_file(module):
    base = ROOT / "kernels" if module.startswith("memlm_kernels") else ROOT
    return (base / module.replace(".", "/")).with_suffix(".py").exists()


FILES = list(files())


def test_imports_go_one_way():
    for path, module in FILES:
        own = room(module)
        for name in imports(path, module):
            top = name.split(".")[0]
            if top in ("memlm", "memlm_kernels"):
                other = room(name)
                allowed = own in OUTER or other == own or other in ROOMS[own]
                assert allowed, f"{module} ({own}) imports {name} ({other})"
            elif top not in sys.stdlib_module_names and own in OUTSIDE:
                assert top in OUTSIDE[own], f"{module} imports {name}"


def test_the_nearest_name_is_found_in_one_place():
    users = [module for path, module in FILES if "difflib" in imports(path, module)]
    assert users == ["memlm.settings"]


def test_a_name_is_one_class():
    """Each memory has its Config, and most their Mixer. Helpers of one file begin with an underscore."""
    found = Counter(
        node.name
        for path, _ in FILES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert {name for name, count in found.items() if count > 1} <= {"Config", "Mixer"}


def test_roles_of_tokens_have_their_numbers_in_one_place():
    names = {"QUERY", "RESPONSE", "TEMPLATE", "QUESTION", "ANSWER"}
    for path, module in FILES:
        assigned = [node for node in tree(path).body if isinstance(node, ast.Assign)]
        numbers = [node for node in assigned if "-1" in ast.unparse(node.value)]
        found = {node.id.lstrip("_") for a in numbers for node in ast.walk(a.targets[0]) if isinstance(node, ast.Name)}
        assert module == "memlm.roles" or not found & names, module


def test_rooms_of_the_kernels_show_only_their_names():
    """Only an op's folder imports its files; others import the folder. Shared files import no folder."""
    kernels = ROOT / "kernels" / "memlm_kernels"
    for path, module in FILES:
        shared = path.parent == kernels and path.name != "__init__.py"
        for name in imports(path, module):
            top, folder, *inside = [*name.split("."), ""]
            if top == "memlm_kernels" and (kernels / folder).is_dir() and not path.is_relative_to(kernels / folder):
                assert not any(inside), f"{module} imports {name}; import it from {top}.{folder}"
                assert not shared, f"{module} imports {name}, which is an op"


def test_files_are_short():
    assert not [path for path, _ in FILES if len(path.read_text().splitlines()) > 500]


def test_every_op_opens_with_the_paper():
    """A loop over tokens in plain PyTorch that fits on a page, and a test that compares with it."""
    folders = [path.parent for path in (ROOT / "kernels/memlm_kernels").glob("*/__init__.py")]
    tests = "".join(path.read_text() for path in (ROOT / "tests/kernels").glob("test_*.py"))
    assert len(folders) >= 8
    for folder in folders:
        lines = (folder / "naive.py").read_text().splitlines()
        assert len(lines) <= 60 and lines[0].startswith('"""')
        used = rf"from memlm_kernels\.{folder.name}(\.naive import| import (.*, )?naive)"
        assert re.search(used, tests), f"no test compares with {folder.name}/naive.py"


# Packages whose module has another name; and packages that no file imports by name, such as tools.
MODULES = {"hydra-core": "hydra", "pyyaml": "yaml", "flash-linear-attention": "fla", "lm-eval": "lm_eval"}
TOOLS = {"pytest-xdist", "ruff", "mypy", "pre-commit", "flash-attn"}


def declared(*extras):
    """The modules of the packages that pyproject.toml declares, for the project itself or for some of its extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] if not extras else chain(*map(project["optional-dependencies"].get, extras))
    names = {re.match(r"[\w-]+", line)[0] for line in lines}
    return {MODULES.get(name, name) for name in names - TOOLS}


def used(*patterns):
    """The external modules that the files import, or without which they skip a test."""
    paths = [path for pattern in patterns for path in ROOT.glob(pattern)]
    names = {name for path in paths for name in imports(path, "")}
    skipped = (re.findall(r"importorskip\(\"(\w+)", path.read_text()) for path in paths)
    own = {"", "memlm", "memlm_kernels", "tests", *(path.stem for path in ROOT.glob("scripts/[!_.]*"))}
    return {name.split(".")[0] for name in chain(names, *skipped)} - own - set(sys.stdlib_module_names)


def test_packages_are_declared_if_and_only_if_they_are_imported():
    needed, optional = declared(), declared("parquet", "cpu-kernels", "fla", "eval", "peft", "hub")
    # The peer of a benchmark has its own environment; the tests write a package outside the repository,
    # and run the scripts.
    assert used("*.py", "memlm/**/*.py", "kernels/**/*.py", "scripts/*.py") - {"titans_pytorch"} == needed | optional
    assert used("tests/**/*.py") - {"foo", "scripts"} - needed - optional == declared("dev") - optional


def test_kernels_is_a_source_root_not_a_package():
    """A package named kernels would shadow Hugging Face's, which transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not any(name.split(".")[0] == "kernels" for file in FILES for name in imports(*file))


def test_scripts_are_thin_and_free_of_side_effects():
    for script in ("train.py", "evaluate.py"):
        lines = (ROOT / script).read_text().splitlines()
        assert len(lines) < 40
    # The root's evaluate.py shadows Hugging Face's evaluate for imports from here.
    body = ast.parse((ROOT / "evaluate.py").read_text()).body
    allowed = (ast.Expr, ast.Import, ast.ImportFrom, ast.Assign, ast.FunctionDef, ast.If)
    assert all(isinstance(node, allowed) for node in body)
