"""A run in tokens, and its plan."""

import functools

import pytest
from omegaconf import OmegaConf

from memlm.cli import completed
from memlm.training.settings import RunSettings
from tests.conftest import composed
from tests.runs import SMALLEST

# Rows of 8 tokens.
SMALL = ("run_dir=nowhere", "data.cache_dir=nowhere", *(s for s in SMALLEST if "batch_size" not in s))


small = functools.cache(lambda: composed(*SMALL))


def settings(*overrides):
    # Composing takes longer than these tests.
    return RunSettings.of(OmegaConf.merge(small(), OmegaConf.from_dotlist(completed([*overrides]))))


@pytest.mark.parametrize(
    ("given", "steps", "rows"),
    [
        (("train.tokens=3200",), 13, 32),
        (("train.tokens=3328", "train.batch_tokens=256"), 13, 32),
        (("train.tokens=3329", "train.batch_tokens=256"), 14, 32),
        (("train.tokens=1.5e9", "train.batch_size=1000"), 187_500, 1000),
        (("train.batch_tokens=64",), 900, 8),
        (("train.tokens=1", "train.batch_size=4"), 1, 4),
        (("train.tokens=null", "train.steps=7"), 7, 32),
    ],
)
def test_tokens_are_steps_and_rows(given, steps, rows):
    """The record is that of the same run in steps."""
    made = settings(*given)
    assert (made.train.steps, made.train.batch_size) == (steps, rows)
    assert made.config == settings(f"train.steps={steps}", f"train.batch_size={rows}").config


def test_a_command_replaces_the_unit_of_a_file():
    in_tokens = OmegaConf.create({"train": {"steps": None, "tokens": 800}})
    cfg = OmegaConf.merge(small(), in_tokens)
    assert RunSettings.of(cfg).train.steps == 4
    given = {a.partition("=")[0]: a.partition("=")[2] for a in completed(["train.steps=5"])}
    assert given == {"train.steps": "5", "train.tokens": "null"}
    OmegaConf.update(cfg, "train", {"steps": 5, "tokens": None}, merge=True)
    assert RunSettings.of(cfg).train.steps == 5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("train.tokens=1e6", "train.steps=5"), r"train.steps=5 and train.tokens=1000000.0: set one"),
        (("train.steps=null",), r"train.steps=null: no size is given; set it, or train.tokens"),
        (("train.batch_size=null",), r"train.batch_size=null: no size is given; set it, or train.batch_tokens"),
        (("train.tokens=-1",), r"train.tokens=-1 must be above 0"),
        (("train.tokens=.inf",), r"train.tokens=inf must be above 0, and finite"),
        (("train.tokens=true",), r"train.tokens=True must be float or null"),
        (("train.tokens=many",), r"train.tokens='many' must be float or null"),
        (("train.batch_tokens=100",), r"train.batch_tokens=100 is no multiple of data.seq_len=8; use 96 or 104"),
        (("train.batch_tokens=5",), r"train.batch_tokens=5 is no multiple of data.seq_len=8; use 8"),
        (("train.tokens=1e20",), r"train.steps=390625000000000000 must be a whole number in"),
    ],
)
def test_wrong_budgets_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        settings(*given)
