"""A run in tokens, and its plan beside the run itself."""

import functools
import json

import pytest
import torch
from omegaconf import OmegaConf
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from memlm.cli import completed
from memlm.flops import count_parameters
from memlm.training import plan as plans
from memlm.training import run
from memlm.training.objective import model_inputs
from memlm.training.plan import plan
from memlm.training.settings import RunSettings
from memlm.training.shards import local
from memlm_kernels import set_backend
from tests import ranks
from tests.conftest import composed
from tests.runs import SMALLEST, config, trainer

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


@pytest.fixture
def text(tmp_path):
    """Settings of rows of text, most of them with two documents."""
    lines = [json.dumps({"text": "It was the best of times. " * (4 + i % 3)}) for i in range(400)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    return (
        "data=text",
        f"data.sources.text.paths=[{tmp_path}/corpus.jsonl]",
        "data.seq_len=96",
        "train.batch_size=16",
    )


def allocated(take, trace):
    """The most bytes above the begin that the allocator of the CPU gave out during a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        begin = torch.empty(1)
        take()
        del begin
    profiler.export_chrome_trace(str(trace))
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    totals = [e["args"]["Total Allocated"] for e in sorted(events, key=lambda e: e["ts"])]
    return max(totals) - totals[0]


@pytest.mark.parametrize(
    "options",
    [
        ("memory=titans_mag", "model.num_hidden_layers=1"),
        ("memory=mom", "train.gradient_checkpointing=true", "optim=adamw"),
        ("memory=gla", "train.gradient_checkpointing=[0,2]", "model.num_hidden_layers=3"),
        ("memory=attention", "train.micro_batch_size=2", "model.hidden_size=128"),
        ("memory=none", "model.hidden_size=128", "train.batch_size=2", "data.seq_len=16"),
        ("memory=titans_mag", "train.trainable=memory"),
        ("memory=gla", "hardware.mixed_precision=bf16", "model.num_hidden_layers=3"),
    ],
    ids=[
        "titans",
        "mom checkpointed",
        "some checkpointed",
        "accumulated",
        "weights alone",
        "memory trained",
        "bf16",
    ],
)
def test_memory_of_a_plan_is_that_of_a_step(tmp_path, text, options):
    """Within 5 % of all bytes of tensors; the weights' and the optimiser's exactly."""
    cfg = config(tmp_path, *options, small=("train.validation_batches=1", *text))
    made, real = plan(RunSettings.of(cfg), 1, cfg.hardware.mixed_precision.replace("auto", "no")), trainer(cfg)
    real._one_step(True)
    states = [x for o in real.optimizers for values in o.state.values() for x in values.values()]
    fixed = sum(x.nbytes for x in [*real.model.parameters(), *states])
    assert (made.weights + made.optimizer, made.parameters) == (fixed, count_parameters(real.model))
    assert made.trained == count_parameters(real.model, trained=True)
    most = fixed + allocated(lambda: real._one_step(True), tmp_path / "trace.json")
    assert made.memory[made.checkpointed].most == pytest.approx(most, rel=0.05)


def test_a_plan_looks_at_the_rows_of_encoded_text(tmp_path):
    """Many short documents in a row double the memory of a step. Before text is encoded, their number is a guess, and
    a plan encodes nothing.
    """
    lines = [json.dumps({"text": "It was. "[: 3 + i % 6]}) for i in range(800)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    data = (f"data.sources.text.paths=[{tmp_path}/corpus.jsonl]", "data.seq_len=96", "train.batch_size=4")
    cfg = config(tmp_path, "data=text", *data, "memory=gla", "match.parameters=null", small=())
    (tmp_path / "cache").mkdir()
    guess = plan(RunSettings.of(cfg), 1, "no")
    assert (guess.documents, guess.known) == (2, False) and "a guess: prepare the data" in "\n".join(guess.lines())
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    real = trainer(cfg)
    made = plan(RunSettings.of(cfg), 1, "no")
    assert made.documents > 12 and made.known and "up to 1" in "\n".join(made.lines())
    real._one_step(True)
    states = [x for o in real.optimizers for values in o.state.values() for x in values.values()]
    fixed = sum(x.nbytes for x in [*real.model.parameters(), *states])
    most = fixed + max(allocated(lambda: real._one_step(True), tmp_path / "trace.json") for _ in range(2))
    assert made.memory[False].most == pytest.approx(most, rel=0.1) and guess.memory[False].most < 0.7 * most


def test_flops_of_a_plan_are_those_of_a_step(tmp_path):
    (tmp_path / "corpus.txt").write_text("It was the best of times. " * 200)
    data = ("data=text", f"data.sources.text.paths=[{tmp_path}/corpus.txt]", "data.seq_len=32", "train.batch_size=1")
    cfg = config(tmp_path, small=("train.validation_batches=1", *data))
    made, real = plan(RunSettings.of(cfg), 1, "no"), trainer(cfg)
    real.model.set_attn_implementation("eager")
    inputs = model_inputs(next(real.feed.batches(0, "train")), "cpu")
    assert inputs["position_ids"] is None
    with set_backend("reference"), FlopCounterMode(display=False) as counter:
        real.objective(**inputs)
    assert counter.get_total_flops() == made.flops * inputs["input_ids"].numel()


def test_a_checkpoint_is_as_large_as_planned(tmp_path):
    cfg = config(tmp_path, "train.steps=1", "model.hidden_size=128", small=SMALLEST)
    made = plan(RunSettings.of(cfg), 1, "no")
    run(cfg)
    (folder,) = (tmp_path / "run" / "checkpoints").glob("step_*")
    sizes = [(folder / name).stat().st_size for name in ("model.safetensors", "trainer.pt")]
    assert sizes == pytest.approx([made.weights, made.optimizer], rel=0.02)


def test_a_dry_run_prints_and_leaves_nothing(tmp_path, capsys):
    options = ("train.dry_run=2", "train.steps=10000000", "train.batch_size=8", "train.micro_batch_size=2")
    run(config(tmp_path, *options, small=SMALLEST))
    assert [*tmp_path.iterdir()] == []
    told = capsys.readouterr().out
    for text in ("10,000,000 steps x 64 tokens = 640,000,000 tokens, by 2 processes in fp32", "2 forwards of 2 rows"):
        assert text in told
    made = plan(RunSettings.of(config(tmp_path, *options, small=SMALLEST)), 2, "no")
    hours = 3 * made.flops * 64e7 / (2 * 2250e12 * 0.4) / 3600
    assert made.hours(2250e12, 0.4) == pytest.approx(hours) and f"{hours:.2f}  NVIDIA B200" in told


def test_sharers_and_pieces_of_rows_need_less():
    """Weights, gradients and optimiser are divided; activations follow the length of a piece."""
    text = ("data.sources.mqar.kind=text", "train.batch_size=64", "model.num_hidden_layers=8")
    options = {"copies": (), "shared": ("hardware.shard=8",), "pieces": ("train.truncate=4",)}
    made = {key: plan(settings(*given, *text), 8, "no") for key, given in options.items()}
    copies, shared, pieces = (made[key].memory[False] for key in ("copies", "shared", "pieces"))
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(shared, part) == getattr(copies, part) / 8
    assert shared.activations == copies.activations and shared.most < copies.most
    rounded = plan(settings(*options["shared"], *text), 8, "bf16").memory[False]
    assert rounded.weights == shared.weights and rounded.most < shared.most
    assert 0.4 < pieces.activations / copies.activations < 0.7 and made["pieces"].flops == made["copies"].flops


def test_a_plan_without_a_tokenizer():
    """With the setting that the error names."""
    cfg = composed(*SMALL, "data.sources.mqar.kind=text", "data.tokenizer=/nowhere", "+model.vocab_size=32000")
    assert plan(RunSettings.of(cfg), 1, "no").parameters > 32_000 * 8


def test_a_plan_in_words():
    made = plan(settings("train.trainable=['lm_head.*']"), 1, "no")
    assert "three times that with its backward, or less, as not all is trained;" in made.lines()[2]
    told = {0: "0 B", 999.4: "999 B", 999.6: "1 kB", 999_700_000: "1 GB", 1.234e15: "1.23 PB", 12_345: "12.3 kB"}
    assert {size: plans._bytes(size) for size in told} == told


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("train.dry_run=0",), "train.dry_run=0 must be true, false, or a number of processes"),
        (("train.dry_run=fast",), "train.dry_run='fast' must be bool or int"),
        (("train.dry_run=3", "train.batch_size=4"), "train.batch_size=4 rows of a step cannot be shared equally by 3"),
        (("train.dry_run=true", "train.trainable={condition: 2}"), "plan with null, or patterns"),
        (("train.dry_run=true", "model.backbone=my/llama"), "train.dry_run: only a new decoder is planned"),
        (
            ("train.dry_run=true", "data.tokenizer=/nowhere/there", "data.sources.mqar.kind=text"),
            r"data.tokenizer: '/nowhere/there' is not .*; or plan without it: \+model.vocab_size=32000",
        ),
        # A run checks these with its model.
        (("train.dry_run=true", "train.truncate=3"), "train.truncate=3 does not divide data.seq_len=8"),
        (("train.dry_run=true", "train.truncate=16"), "train.truncate=16 does not divide data.seq_len=8"),
        (
            ("train.dry_run=true", "train.truncate=4", "train.lengths=[[4,64]]", "data.sources.mqar.kind=text"),
            "needs rows of one length",
        ),
        (("train.dry_run=3", "train.batch_size=3", "hardware.sequence_parallel=3"), "=3 does not divide rows of 8"),
    ],
)
def test_wrong_plans_are_named(given, message):
    cfg = OmegaConf.create(OmegaConf.to_container(small()))
    with pytest.raises(ValueError, match=message):
        run(OmegaConf.merge(cfg, OmegaConf.from_dotlist([*given])))


def memory_of_steps(rank, size, cfg, folder):
    """Bytes of a process's parameters and optimisers, and the most above them during the least of three steps."""
    real = trainer(cfg)
    real._one_step(True)
    states = [x for o in real.optimizers for values in o.state.values() for x in values.values()]
    held = sum(local(x).nbytes for x in [*real.model.parameters(), *states])
    # gloo holds copies for as long as another process is late.
    return held + min(allocated(lambda: real._one_step(True), folder / f"trace{rank}.json") for _ in range(3))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_memory_of_a_plan_is_that_of_sharers(tmp_path, precision):
    wide = ("model.num_hidden_layers=8", "model.hidden_size=256", "model.num_attention_heads=4", "train.batch_size=4")
    wide = (*wide, "memory=titans_mag", "data.seq_len=32", "optim=adamw", "hardware=fsdp2")
    cfg = config(tmp_path, *wide, f"hardware.mixed_precision={precision}", small=SMALLEST)
    made = plan(RunSettings.of(cfg), 2, precision).memory[False].most
    assert made == pytest.approx(min(ranks.run(memory_of_steps, 2, tmp_path, cfg, tmp_path)), rel=0.1)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("train.lengths=[[4,64]]", r"train.lengths cuts rows of text, and data.sources.mqar has whole tasks"),
        ("train.carry=true", r"train.carry: no source of data is a text; leave it out"),
    ],
)
def test_a_plan_refuses_rows_that_the_run_refuses(option, message):
    with pytest.raises(ValueError, match=message):
        plan(settings(option), 1, "no")
