"""Between the command line and ``run(cfg)``: one readable line for a user's mistake, and the preset for a GPU."""

import difflib
import io
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from transformers.utils.logging import disable_progress_bar

from memlm.memory.base import suggest

TRACED = os.environ.get("HYDRA_FULL_ERROR") == "1"

# Keys of earlier versions, and where to turn.
_GONE = {
    "train.gradient_accumulation": "train.batch_size is all rows of a step, train.micro_batch_size those of a forward"
}


@contextmanager
def user_errors(config_dir: Path, config: str) -> Iterator[None]:
    """Print mistakes in configuration or input as one line and exit with code 2, or, after a signal, with 128 and its
    number.

    HYDRA_FULL_ERROR=1 shows the traceback instead.
    """
    for stream in (sys.stdout, sys.stderr):
        # Names may have letters that a terminal lacks.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # Saving and loading are instant beside training, and one progress bar is enough.
    disable_progress_bar()
    # Hydra then raises what it would otherwise print over many lines.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    except KeyboardInterrupt as stop:
        code = 128 + getattr(stop, "number", signal.SIGINT)
        leave_group(code)
        sys.exit(code)
    except (ValueError, OSError, HydraException, OmegaConfBaseException) as error:
        if TRACED:
            raise
        print(f"error: {one_line(error, config_dir, config)}", file=sys.stderr)
        sys.exit(2)


def leave_group(code: int = 0) -> None:
    """End a process that is one of several, at once, with this exit code.

    A thread of gloo's may still need the interpreter to let go of its last tensors. Taking the process group down
    waits for that thread with the interpreter held, for ever; the interpreter's end aborts it (torch 2.13).
    """
    if torch.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def use_gpu_preset(argv: list[str], preset: str, unless: tuple[str, ...]) -> list[str]:
    """``argv``, with ``preset`` added where there is a GPU and no key of ``unless`` is set by hand."""
    chosen = any(argument.startswith(unless) for argument in argv)
    return argv if chosen or not torch.cuda.is_available() else [*argv, preset]


def mixer_settings(argv: list[str]) -> list[str]:
    """``argv``, with settings of a mixer that its YAML leaves at their defaults open to being set.

    Hydra refuses keys that no YAML names; whether a mixer has them is for its own configuration to say.
    """
    return [f"++{a}" if re.match(r"model\.mixers\.\w+\.\w+=", a) else a for a in argv]


def one_line(error: Exception, config_dir: Path, config: str) -> str:
    """The message of a composition error with the key, and the nearest key or the choices there are."""
    text = str(error).strip() or type(error).__name__
    missing_key = r"Could not override '([^']+)'|Key '([^']+)' is not in struct"
    if match := re.search(missing_key, text):
        wrong = match[1] or match[2]
        given = next((a for a in sys.argv[1:] if a.lstrip("+~").startswith(f"{wrong}=")), wrong)
        close = difflib.get_close_matches(wrong, _keys(config_dir, config), n=1)
        fix = f"did you mean {close[0]!r}?" if close else f"'python {config}.py --help' lists the keys"
        fix = _GONE.get(wrong, fix)
        return f"{given}: there is no key {wrong!r}; {fix}"
    if match := re.search(r"Could not find '([^']+)/([^']+)'", text):
        group, name = match.groups()
        if (config_dir / "memory" / f"{name}.yaml").exists() and group.startswith("memory/of_model/"):
            known = sorted(path.stem for path in (config_dir / group).glob("*.yaml"))
            return (
                f"memory={name}: model={Path(group).name}_* has no settings for it; one of: {', '.join(known)}; "
                f"or add memory/of_model=none to take memory={name} as it is"
            )
        choices = sorted(path.stem for path in (config_dir / group).glob("*.yaml"))
        return f"{group}={name}: no such choice; {suggest(name, choices)}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0] if isinstance(error, HydraException | OmegaConfBaseException) else " ".join(lines)


def _keys(config_dir: Path, config: str) -> list[str]:
    """Groups, and all keys of the default configuration."""
    with initialize_config_dir(str(config_dir), version_base="1.3"):
        keys = _flatten(OmegaConf.to_container(compose(config)), "")
    return [*(path.name for path in config_dir.iterdir() if path.is_dir()), *keys]


def _flatten(node: dict[str, Any], prefix: str) -> list[str]:
    keys = []
    for key, value in node.items():
        keys.append(f"{prefix}{key}")
        keys += _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else []
    return keys
