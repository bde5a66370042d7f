"""Between the command line and ``run(cfg)``: one line for a user's mistake, and the preset for a GPU."""

import io
import itertools
import os
import re
import signal
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from transformers.utils.logging import disable_progress_bar
from yaml import YAMLError

from memlm.settings import require, suggest

_MISTAKES = (ValueError, OSError, HydraException, OmegaConfBaseException, YAMLError, RecursionError)
TRACED = os.environ.get("HYDRA_FULL_ERROR") == "1"

# A dict of the evaluation, as an argument.
_DICT = re.compile(r"(eval\.[\w.]+=)\s*\{")

# Keys of earlier versions, and their replacements.
_GONE = {
    "train.gradient_accumulation": "train.batch_size is all rows of a step, train.micro_batch_size those of a forward"
}
# Two keys for one size, of which a configuration sets one.
_UNITS = (("train.steps", "train.tokens"), ("train.batch_size", "train.batch_tokens"))


@contextmanager
def user_errors(config_dir: Path, config: str) -> Iterator[None]:
    """Print mistakes in configuration or input as one line and exit with code 2; after a signal, exit with 128 + its
    number.

    HYDRA_FULL_ERROR=1 shows the traceback instead.
    """
    for stream in (sys.stdout, sys.stderr):
        # Names may have letters that the terminal cannot show.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # Saving and loading are fast compared with training, and one progress bar is enough.
    disable_progress_bar()
    # Hydra then raises errors instead of printing them over many lines.
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    except KeyboardInterrupt as stop:
        code = 128 + getattr(stop, "number", signal.SIGINT)
        leave_group(code)
        sys.exit(code)
    except Exception as error:
        if TRACED or not is_mistake(error):
            raise
        print(f"error: {one_line(error, config_dir, config)}", file=sys.stderr)
        leave_group(2)
        sys.exit(2)
    finally:
        # Programs that are started later inherit it.
        if before is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before


def is_mistake(error: Exception) -> bool:
    """Whether a user can mend the cause of an error."""
    return isinstance(error, _MISTAKES) or _out_of_memory(error)


def leave_group(code: int = 0) -> None:
    """End one process of several at once, with this exit code.

    A thread of gloo may still need the interpreter's lock to release its last tensors. Destroying the process group
    waits for that thread while it holds the lock: a deadlock. A normal exit of the interpreter aborts (torch 2.13).
    """
    if torch.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def use_gpu_preset(argv: list[str], preset: str, unless: tuple[str, ...]) -> list[str]:
    """``argv``, plus ``preset`` if there is a GPU and the user sets no key of ``unless``."""
    chosen = any(argument.startswith(unless) for argument in argv)
    return argv if chosen or not torch.cuda.is_available() else [*argv, preset]


def completed(argv: list[str]) -> list[str]:
    """``argv``, so that Hydra finds the group of a backbone, and the settings that no YAML names; of two units for one
    size, the one given.
    """
    return one_unit(open_settings(backbone_model(argv)))


def one_unit(argv: list[str]) -> list[str]:
    """``argv``, plus null for a size that a YAML gives in one unit and the command line in the other."""
    given = {key for key, _, value in (argument.partition("=") for argument in argv) if value != "null"}
    named = {argument.partition("=")[0] for argument in argv}
    pairs = [(a, b) for pair in _UNITS for a, b in (pair, pair[::-1])]
    return [*argv, *(f"{other}=null" for key, other in pairs if key in given and other not in named)]


def backbone_model(argv: list[str]) -> list[str]:
    """``argv``, plus ``model=backbone`` if it names a backbone and no model."""
    keys = {argument.partition("=")[0]: argument for argument in argv}
    named = keys.get("backbone", "backbone=null") != "backbone=null"
    return [*argv, "model=backbone"] if named and "model" not in keys else argv


def open_settings(argv: list[str]) -> list[str]:
    """``argv``, where settings of a mixer and of the evaluation that no YAML names can be set too.

    Hydra refuses keys that no YAML names; the mixer's own configuration, or the measures, then check whether they
    exist. It also merges a dict into that of the YAML: one of the evaluation is emptied first, so that
    ``eval.ask={mqar: {}}`` asks this task alone.
    """
    opened = []
    for argument in argv:
        setting = re.match(r"(model\.mixers\.\w+\.\w+|eval\.[\w.]+)=", argument)
        if found := _DICT.match(argument):
            opened.append(f"++{found[1]}null")
        opened.append(f"++{argument}" if setting else argument)
    return opened


def typed(argv: list[str]) -> list[str]:
    """The arguments of the evaluation before ``open_settings``."""
    found: list[str] = []
    for argument in argv:
        own = argument.removeprefix("++") if argument.startswith("++eval.") else argument
        if (given := _DICT.match(own)) and found[-1:] == [f"{given[1]}null"]:
            found.pop()
        found.append(own)
    return found


def of_memory(cfg: DictConfig, hydra: DictConfig) -> DictConfig:
    """``cfg`` with the settings that ``of_memory`` lists for the chosen memory applied to ``model.mixers.memory``.

    hydra: the ``hydra`` node of the same composition; its overrides, from the command line, take precedence

    Raises ValueError for a memory that does not exist, and for full attention beside a backbone.
    """
    if "of_memory" not in cfg:
        return cfg
    backbone = OmegaConf.select(cfg, "model.backbone")
    alone = backbone is not None and hydra.runtime.choices.memory == "attention"
    require(not alone, f"memory=attention beside backbone={backbone}: it has its own attention; use memory=none")
    with open_dict(cfg):
        settings = cfg.pop("of_memory")
        require(OmegaConf.is_dict(settings), f"of_memory={settings} must be settings, {{memory: {{key: value}}}}")
        known = GlobalHydra.instance().config_loader().get_group_options("memory")
        for memory, values in settings.items():
            require(memory in known, f"of_memory.{memory}: no such memory; {suggest(str(memory), known)}")
            require(OmegaConf.is_dict(values), f"of_memory.{memory}={values} must be settings, {{key: value}}")
        if chosen := settings.get(hydra.runtime.choices.memory):
            OmegaConf.update(cfg, "model.mixers.memory", chosen, merge=True)
        # Unresolved: a value may name another key.
        given = OmegaConf.to_container(hydra.overrides.task, resolve=False)
        for override in OverridesParser.create().parse_overrides(given):
            key = override.key_or_group
            if key.startswith("model.") and override.is_delete():
                parent, _, name = key.rpartition(".")
                if OmegaConf.is_dict(node := OmegaConf.select(cfg, parent)):
                    node.pop(name, None)
            elif key.startswith("model."):
                OmegaConf.update(cfg, key, override.value(), merge=True)
    return cfg


def composed(config_dir: Path, config: str, overrides: Sequence[str]) -> DictConfig:
    """The configuration that ``python <config>.py *overrides`` runs."""
    with initialize_config_dir(str(config_dir), version_base="1.3"):
        cfg = compose(config, [*overrides], return_hydra_config=True)
        with open_dict(cfg):
            hydra = cfg.pop("hydra")
        from memlm.training.match import matched

        return matched(of_memory(cfg, hydra), hydra)


def check_arguments(argv: list[str], config_dir: Path, config: str) -> None:
    """Raise ValueError, naming the argument and a fix, unless all are ``key=value`` of existing keys.

    ``--help`` prints and exits.
    """
    parser = get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign]
    arguments, unknown = parser.parse_known_args(argv)
    for argument in unknown:
        key = argument.lstrip("-").partition("=")[0]
        raise ValueError(
            f"{argument}: settings are written key=value, without dashes; {_meant(key, config_dir, config)}"
        )
    if arguments.help:
        print(help_text(config_dir, config))
        sys.exit()
    groups, known = _groups(config_dir), {*_top(config_dir, config), "hydra"}
    for argument in arguments.overrides:
        written, equals, value = argument.partition("=")
        key = written.lstrip("+~")
        try:
            override = OverridesParser.create().parse_override(argument)
        except HydraException:
            fix = f"quote the value, as in {_quoted(written, value)}" if equals else "write key=value"
            raise ValueError(f"{argument}: cannot be read; {fix}") from None
        if not key:
            raise ValueError(f"{argument}: names no key; write key=value")
        if override.is_delete() and "." not in key:
            raise ValueError(f"{argument}: {config}.py needs {key}; leave this out")
        if written.startswith("+") and key.partition(".")[0].partition("@")[0] not in known:
            raise ValueError(f"{argument}: there is no key {key!r}; {_meant(key, config_dir, config)}")
        if key in groups and not override.is_sweep_override():
            named = override.value()
            # A dict is merged into the group's settings.
            if not isinstance(named, str | dict) or named == "":
                raise ValueError(f"{argument}: names no choice; {suggest(value, _choices(config_dir, key))}")


def help_text(config_dir: Path, config: str) -> str:
    """The groups of a command, their choices with one line each, and its keys, all from the YAML files.

    The top of ``<config>.yaml`` describes the command and has examples. A comment after an item of its defaults
    describes a group, the first comment of a choice's file the choice, and a comment before a key the key.
    """
    own = (config_dir / f"{config}.yaml").read_text()
    parts = [_comment(own), "Groups and their choices; * is the default."]
    notes = _notes(own, "")
    for group, default, meaning in re.findall(r"^  - (\w+): (\w+)  # (.*)$", own, re.MULTILINE):
        lines = [f"{group}=  {meaning}"]
        for name in _choices(config_dir, group):
            first = _comment((config_dir / group / f"{name}.yaml").read_text()).partition("\n")[0]
            lines.append(f"  {'*' if name == default else ' '} {name:<17} {first}")
        parts.append("\n".join(lines))
        if default != "null":
            notes |= _notes((config_dir / group / f"{default}.yaml").read_text(), f"{group}.")
    with initialize_config_dir(str(config_dir), version_base="1.3"):
        keys = OmegaConf.to_yaml(compose(config))
    told = []
    for path, line in _paths(keys):
        indent = f"{' ' * (len(line) - len(line.lstrip()))}# "
        told += [*textwrap.wrap(notes.get(path, ""), 110, initial_indent=indent, subsequent_indent=indent), line]
    parts.append("\n".join(["Keys of the default run:", *told]))
    more = "--cfg job prints the settings of a command without running it, --hydra-help Hydra's own flags."
    return "\n\n".join([*parts, more])


def _comment(text: str) -> str:
    """The comment at the start of a YAML file, after an optional package line."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    return "\n".join(line[2:] for line in lines if not line.startswith("# @package"))


def _paths(text: str) -> Iterator[tuple[str, str]]:
    """The lines of a YAML file, each behind its key's whole path, or an empty string."""
    names: list[str] = []
    for line in text.splitlines():
        key = re.match(r"( *)(\w+):", line)
        if key:
            names = [*names[: len(key[1]) // 2], key[2]]
        yield ".".join(names) if key else "", line


def _notes(text: str, package: str) -> dict[str, str]:
    """The comments before keys, by the keys' paths in a whole configuration; without the comment on top of the file.

    package: the path of the file's own keys, unless it names one
    """
    notes, comment = {}, []
    package = f"{named[1]}." if (named := re.search(r"^# @package (\S+)$", text, re.MULTILINE)) else package
    text = text.removeprefix("\n".join(itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())))
    for path, line in _paths(text):
        if path and comment:
            notes[f"{package}{path}"] = " ".join(comment)
        comment = [*comment, line.strip("# ")] if line.lstrip().startswith("#") else []
    return notes


def _quoted(key: str, value: str) -> str:
    """A value, or the items of a list, quoted for Hydra, and the whole quoted for a shell."""
    items = [item.strip(" '\"") for item in value.strip("[]{}").split(",")]
    text = ", ".join(f'"{item}"' for item in items)
    return f"'{key}=[{text}]'" if value.startswith("[") else f"'{key}={text}'"


def _refuse(message: str) -> NoReturn:
    raise ValueError(f"{message}; settings are written key=value")


def _out_of_memory(error: Exception) -> bool:
    # torch's CPU allocator raises no specific type.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def one_line(error: Exception, config_dir: Path, config: str) -> str:
    """The message of a composition error in one line, with the key and the nearest key or the available choices."""
    text = str(error).strip() or type(error).__name__
    missing_key = r"Could not override '([^']+)'|Key '([^']+)' is not in struct"
    if match := re.search(missing_key, text):
        wrong = match[1] or match[2]
        given = next((a for a in sys.argv[1:] if a.lstrip("+~").startswith(f"{wrong}=")), wrong)
        return f"{given}: there is no key {wrong!r}; {_meant(wrong, config_dir, config)}"
    if match := re.search(r"Could not find '([^']+)/([^']+)'", text):
        return _no_choice(f"{match[1]}/{match[2]}", config_dir)
    if "hydra/launcher/submitit_" in text:
        return "hydra/launcher: submitit is not installed; pip install -e '.[cluster]', or leave it out"
    if isinstance(error, YAMLError):
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f"{mark.name}, line {mark.line + 1}" if mark else "a YAML file"
        return f"{where}: {problem or text.splitlines()[0]}"
    if isinstance(error, UnicodeDecodeError):
        return f"a file of settings is not text in UTF-8 ({text})"
    if isinstance(error, RecursionError):
        return "a value or a file of settings is nested too deep"
    if _out_of_memory(error):
        reason = text.splitlines()[0].split("DefaultCPUAllocator: ")[-1]
        return f"out of memory ({reason}); lower the model's sizes, rows or lengths, or use another device"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return f"{error.full_key}: {lines[0]}"
    return " ".join(lines[:2] if isinstance(error, HydraException | OmegaConfBaseException) else lines)


def _meant(wrong: str, config_dir: Path, config: str) -> str:
    """A hint at the key that was probably meant: a key that ends with the wrong one, or the nearest."""
    if wrong in _GONE:
        return _GONE[wrong]
    keys = _keys(config_dir, config)
    if wrong in keys:
        return "the default run has it, but a choice of this command has not; leave one of the two out"
    longer = [key for key in keys if key.endswith(f".{wrong}")]
    return suggest(longer[0] if longer else wrong, keys, f"'python {config}.py --help' lists the keys")


def _no_choice(path: str, config_dir: Path) -> str:
    """The message for a missing YAML: the choices of its group."""
    group = max((name for name in _groups(config_dir) if path.startswith(f"{name}/")), key=len, default="")
    name = path.removeprefix(f"{group}/")
    choices = _choices(config_dir, group)
    if group.startswith("memory/of_model/") and name in _choices(config_dir, "memory"):
        return (
            f"memory={name}: model={Path(group).name}_* has no settings for it; one of: {', '.join(choices)}; or add "
            f"memory/of_model=none to take memory={name} as it is"
        )
    return f"{group}={name}: no such choice; {suggest(name, choices)}"


def _groups(config_dir: Path) -> set[str]:
    return {path.relative_to(config_dir).as_posix() for path in config_dir.rglob("*") if path.is_dir()}


def _choices(config_dir: Path, group: str) -> list[str]:
    return sorted(path.stem for path in (config_dir / group).glob("*.yaml"))


def _keys(config_dir: Path, config: str) -> list[str]:
    """Groups, and all keys of the default configuration."""
    with initialize_config_dir(str(config_dir), version_base="1.3"):
        keys = _flatten(OmegaConf.to_container(compose(config)), "")
    return [*_top(config_dir, config), *keys]


def _top(config_dir: Path, config: str) -> list[str]:
    """Groups that a configuration is composed of, and its own keys."""
    own = OmegaConf.load(config_dir / f"{config}.yaml")
    named = [next(iter(item)) for item in own.pop("defaults", None) or [] if item != "_self_"]
    return [*(name.split()[-1] for name in named), *own]


def _flatten(node: dict[str, Any], prefix: str) -> list[str]:
    keys = []
    for key, value in node.items():
        keys.append(f"{prefix}{key}")
        keys += _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else []
    return keys
