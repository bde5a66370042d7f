"""A run is its configuration and a step: resumed, interrupted, killed, refused."""

import copy
import json
import math
import os
import re
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM

from memlm.data import Batch, Row
from memlm.hub import load_model
from memlm.training import checkpoint, run
from memlm.training.model import checkpoint_layers
from memlm.training.objective import Objective, model_inputs, score
from memlm.training.optim import Muon, build_optimizers, parameter_groups
from memlm.training.settings import OptimSettings
from memlm_kernels.testing import assert_close, relative_error
from tests import processes
from tests.conftest import ROOT, build, composed
from tests.processes import Python
from tests.ranks import train
from tests.runs import SMALL, SMALLEST, config, figures, stopped, trainer
from tests.test_any_model import LLAMA


def optim_settings(*overrides):
    return OptimSettings(**OmegaConf.to_container(composed(*overrides).optim))


def test_a_run_leaves_what_it_promises(tmp_path, capsys):
    run(config(tmp_path, "train.steps=5"))
    losses = figures(tmp_path)
    assert list(losses) == [0, 1, 2, 3, 4] and losses[0] == pytest.approx(math.log(259), rel=0.05)
    for name in ("layer0/gate", "layer1/memory_norm", "layer0/surprise", "loss/mqar", "grad_norm"):
        assert 0 in figures(tmp_path, name)
    assert set(figures(tmp_path, "validation/passkey/accuracy")) == {4, 5}
    folder = checkpoint.latest(tmp_path / "run")
    assert folder.name == "step_000005"
    assert {"config.json", "model.safetensors", "tokenizer.json", "trainer.pt"} <= {p.name for p in folder.iterdir()}
    screen = capsys.readouterr().out
    assert re.search(r" \d+,\d{3} parameters, 0\.\d MFLOPs a token forward, on cpu", screen)
    assert "no GPU" in screen and "\x1b" not in screen
    run(config(tmp_path, "train.steps=5"))
    assert "all 5 steps are done" in capsys.readouterr().out


@pytest.mark.parametrize("overrides", [(), ("optim=adamw", "train.micro_batch_size=2")], ids=["muon", "adamw"])
def test_resuming_is_exact(tmp_path, overrides):
    """A run that is stopped after 2 of 5 steps and started again has bitwise equal losses."""
    run(config(tmp_path / "straight", "train.steps=5", *overrides))
    assert stopped(config(tmp_path, "train.steps=5", *overrides), 2) == signal.SIGTERM
    assert checkpoint.latest(tmp_path / "run").name == "step_000002"
    run(config(tmp_path, "train.steps=5", *overrides))
    assert figures(tmp_path) == figures(tmp_path / "straight")
    validation = "validation/mqar/loss"
    assert (
        figures(tmp_path, validation) == figures(tmp_path / "straight", validation)
        and len(figures(tmp_path, validation)) == 2
    )


def test_a_run_starts_with_the_weights_of_another(tmp_path, capsys):
    """A second stage: same weights, a smaller chunk; fresh optimisers and step. Its own checkpoints come first."""
    run(config(tmp_path / "first", "train.steps=3"))
    stage = (f"train.init_from={tmp_path}/first/run", "model.mixers.memory.chunk_size=4", "train.steps=4")
    second = config(tmp_path, *stage)
    fresh = trainer(second)
    folder = checkpoint.latest(tmp_path / "first" / "run")
    assert f"weights: {folder}" in capsys.readouterr().out
    assert fresh.step == 0 and not any(o.state_dict()["state"] for o in fresh.optimizers)
    assert fresh.model.config.mixers["memory"]["chunk_size"] == 4
    for (name, a), (_, b) in zip(load_model(folder).named_parameters(), fresh.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    AcceleratorState._reset_state(reset_partial_state=True)
    run(second)
    assert OmegaConf.load(tmp_path / "run" / "config.yaml").train.init_from == f"{tmp_path}/first/run"
    shutil.rmtree(tmp_path / "first")
    resumed = trainer(second)
    assert resumed.step == 4
    assert not torch.equal(resumed.model.lm_head.weight, fresh.model.lm_head.weight)


def test_a_dense_model_is_a_start_for_chosen_chunks_and_slots(tmp_path):
    """If all chunks are chosen, the first loss is the dense model's on the same rows, however the choice learns; if
    few are chosen, nearly. A gate that starts closed opens; one that does not start closed is refused. So it is with
    slots beside a window that covers the rows.
    """
    start, first = f"train.init_from={tmp_path}/first/run", ("train.steps=8", "optim.lr=3e-2")
    shared = ("+model.num_key_value_heads=1", "+model.mixers.memory.qk_norm=true")
    run(config(tmp_path / "first", "memory=attention", *first, *shared))

    def losses(name, *overrides):
        AcceleratorState._reset_state(reset_partial_state=True)
        run(config(tmp_path / name, "train.steps=1", start, *shared, *overrides))
        return figures(tmp_path / name)

    def sparse(name, *settings):
        settings = (*settings, "conv_size=0", "initialization=default", "far_positions=true")
        return losses(name, "memory=chunk_sparse", *(f"++model.mixers.memory.{x}" for x in settings))

    dense = losses("dense", "memory=attention")
    assert dense[0] < 4.5
    taught = {"compressed": ("gate=tanh",), "distilled": ("learning=distilled", "loss_weight=0.0")}
    for learning, settings in taught.items():
        assert sparse(learning, "top_k=32", *settings)[0] == pytest.approx(dense[0], rel=1e-6)
    model = load_model(checkpoint.latest(tmp_path / "compressed" / "run"))
    assert all(layer.mixer.gate.bias.abs().min() > 1e-6 for layer in model.model.layers)
    few = sparse("few", "top_k=2", "gate=tanh")
    assert few[0] != pytest.approx(dense[0], rel=1e-6) and few[0] == pytest.approx(dense[0], rel=0.02)
    with pytest.raises(ValueError, match=r"layers\.0\.mixer\.gate\.weight is missing there and \[2, 32\] here"):
        sparse("open", "gate=sigmoid")

    def bmojo(name, *settings):
        settings = (*settings, "attention_conv_size=0", "initialization=default", "window_size=128")
        return losses(name, "memory=bmojo", *(f"++model.mixers.memory.{x}" for x in settings))

    assert bmojo("bmojo", "gate=tanh")[0] == pytest.approx(dense[0], rel=1e-6)
    with pytest.raises(ValueError, match=r"layers\.0\.mixer\.memory\.\S+ is missing there"):
        bmojo("open", "gate=none")


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A run of one step on texts, and the overrides that name them."""
    folder = tmp_path_factory.mktemp("started")
    (folder / "corpus").mkdir()
    for i in range(40):
        (folder / "corpus" / f"{i}.txt").write_text(f"document {i}: it was the best of times " * 20)
    text = ("data=text", f"data.sources.text.paths=[{folder}/corpus]")
    run(config(folder, "train.steps=1", *text))
    return folder / "run", text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "+model.intermediate_size=50",
            r"layers\.0\.mlp\.gate_proj\.weight is \[88, 32\] there and \[50, 32\] here \(5 more differ\); set model",
        ),
        ("model.num_hidden_layers=1", r"layers\.1\.input_layernorm\.weight is \[32\] there and missing here"),
        ("model.num_hidden_layers=3", r"layers\.2\.input_layernorm\.weight is missing there and \[32\] here"),
        ("+model.tie_word_embeddings=true", r"lm_head\.weight is \[259, 32\] there and missing here; set model"),
        ("+model.rope_theta=5.0e5", r"its rope_theta is 10000\.0, not 500000\.0; set model\.rope_theta=10000\.0"),
        ("data.tokenizer={bpe: 300}", r"its tokens differ .* set data\.tokenizer=\S+step_000001"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, started, override, message):
    first, text = started
    with pytest.raises(ValueError, match=rf"^train\.init_from={first}: .*{message}") as caught:
        run(config(tmp_path, f"train.init_from={first}", *text, override))
    assert "\n" not in str(caught.value)
    assert [p.name for p in (tmp_path / "run").iterdir()] == [".lock"]


def test_another_run_in_the_same_place_is_refused(tmp_path):
    run(config(tmp_path, "train.steps=1", small=SMALLEST))
    with pytest.raises(
        ValueError,
        match=r"optim\.lr=0\.1, but the run in .* has 0\.003; set optim\.lr=0\.003 to continue that run, or choose",
    ):
        run(config(tmp_path, "train.steps=1", "optim.lr=0.1", small=SMALLEST))


def test_a_full_disk_loses_no_earlier_checkpoint(tmp_path, monkeypatch):
    real = torch.save

    def save(state, path):
        if state["step"] > 3:
            raise OSError(28, "No space left on device")
        real(state, path)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match=r"step_000006: could not be written .*No space.*free disk space"):
        run(config(tmp_path, "train.steps=7", small=SMALLEST))
    monkeypatch.undo()
    assert checkpoint.latest(tmp_path / "run").name == "step_000003"
    assert not list((tmp_path / "run" / "checkpoints").glob("*.tmp"))
    run(config(tmp_path, "train.steps=7", small=SMALLEST))
    assert sorted(figures(tmp_path)) == list(range(7))


def test_checkpoints_are_kept_by_number_and_a_torn_one_is_never_taken(tmp_path):
    run(config(tmp_path, "train.steps=10", "train.save_every=2", "train.keep=3", small=SMALLEST))
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(p.name for p in folder.glob("step_*")) == ["step_000006", "step_000008", "step_000010"]
    (folder / "step_000012.tmp").mkdir()
    (folder / "latest").unlink()
    assert checkpoint.latest(tmp_path / "run").name == "step_000010"


def test_a_damaged_trainer_file_is_named(tmp_path):
    run(config(tmp_path, "train.steps=1", small=SMALLEST))
    folder = checkpoint.latest(tmp_path / "run")
    (folder / "trainer.pt").write_bytes((folder / "trainer.pt").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"trainer\.pt: damaged or missing"):
        checkpoint.load_trainer(folder)


def test_a_diverging_run_stops_with_a_fix(tmp_path):
    with pytest.raises(ValueError, match=r"loss is .*lower optim\.lr"):
        run(config(tmp_path, "train.steps=40", "optim=adamw", "optim.lr=1e30"))


def test_broken_weights_are_never_saved(tmp_path):
    """Also between logged steps: the last good checkpoint stays."""
    rates = ("optim.lr=1e7", "optim.muon_lr=1e6", "optim.warmup_steps=0")
    with pytest.raises(ValueError, match=r"lower optim\.lr"):
        run(config(tmp_path, "train.steps=50", "train.log_every=100", "train.save_every=1", *rates))
    for folder in (tmp_path / "run" / "checkpoints").glob("step_*"):
        assert all(torch.isfinite(p).all() for p in load_model(folder).parameters())


def test_checkpoints_sort_by_number(tmp_path):
    folder = tmp_path / "checkpoints"
    for step in (998_000, 999_000, 1_000_000):
        (folder / f"step_{step:06d}").mkdir(parents=True)
    assert checkpoint.latest(tmp_path).name == "step_1000000"


def test_accumulated_parts_are_one_batch(tmp_path):
    """Two parts of two rows take the step, and log the losses, of one batch of the same four rows."""
    one = trainer(config(tmp_path / "one"))
    whole = one._one_step(logged=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    two = trainer(config(tmp_path / "two", "train.micro_batch_size=2"))
    accumulated = two._one_step(logged=True)
    for name in ("loss", "rows", "grad_norm"):
        assert torch.allclose(whole[name], accumulated[name], rtol=1e-4), name
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr=abc", "optim.lr='abc' must be float"),
        ("optim.betas=[0.9]", r"optim.betas=\[0.9\] must be two numbers"),
        ("optim.clip=null", "optim.clip=None must be float"),
        ("optim.muon_lr=null", "optim.muon_lr=null; give Muon a learning rate"),
        ("optim.warmup_steps=-1", "optim.warmup_steps=-1"),
        ("train.steps=true", "train.steps=True must be int"),
        ("train.gradient_checkpointing=maybe", "train.gradient_checkpointing='maybe' must be bool or list"),
        ("train.gradient_checkpointing=[]", r"train.gradient_checkpointing=\[\] must be true, false, or names"),
        ("train.gradient_checkpointing=[memry]", "'memry' names no mixer of a layer, and no layer; use "),
        ("train.gradient_checkpointing=[9]", "train.gradient_checkpointing: 9 names no mixer .* numbers from 0 to "),
        ("train.lm_weight=-0.1", r"train\.lm_weight=-0\.1 must not be negative"),
        ("train.validation_batches=0", "train.validation_batches=0"),
        ("train.init_from=runs/nowhere", "train.init_from=runs/nowhere: there is no run and no checkpoint there"),
        ("train.init_from=3", "train.init_from=3 must be str or null"),
        ("train.steps=1000000000000", r"train\.steps=1000000000000 must be a whole number in \[1, 1,000,000,000\]"),
        ("train.batch_size=10000000", r"train\.batch_size=10000000 must be a whole number in \[1, 1,000,000\]"),
        ("train.micro_batch_size=0", "train.micro_batch_size=0 must be a whole number"),
        ("train.lm_weight=inf", "train.lm_weight=inf must not be negative, and be finite"),
        ("optim.lr=inf", "optim.lr=inf must be a finite number"),
        ("optim.weight_decay=nan", "optim.weight_decay=nan must"),
        ("optim.schedule_steps=0", "optim.schedule_steps=0 must lie in"),
        ("seed=1.5", "seed=1.5 must be int"),
        ("seed=100000000000000000000", "seed=100000000000000000000 must lie in"),
        ("hardware.compile=maybe", "hardware.compile='maybe' must be bool"),
        ("run_dir=''", "run_dir=''"),
        ("hardware.device=tpu", "hardware.device='tpu'"),
        ("hardware.kernels=cuda", "hardware.kernels='cuda' is unknown; use one of auto, reference, triton, fla"),
        ("tracker.name=mlflow", "tracker.name='mlflow' is unknown; use none, wandb, tensorboard, or a list"),
        ("tracker.name=[wandb,aim]", "tracker.name='aim' is unknown"),
    ],
)
def test_bad_settings_are_named(tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        run(composed(*SMALL, "train.steps=3", f"run_dir={tmp_path}/run", f"data.cache_dir={tmp_path}", override))


def test_control_sees_the_same_batches_in_the_same_order(tmp_path):
    seen = {}
    for memory in ("titans_mag", "none"):
        made = trainer(config(tmp_path / memory, f"memory={memory}"))
        seen[memory] = [made.mixture.batch(i).input_ids for i in (0, 7)]
    assert all(torch.equal(a, b) for a, b in zip(*seen.values(), strict=True))


def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path):
    process = Python(ROOT / "train.py", *SMALL, f"run_dir={tmp_path}/run", "train.steps=100000")
    process.until(lambda: (tmp_path / "run" / "metrics.jsonl").exists() and len(figures(tmp_path)) >= 5)
    process.send_signal(signal.SIGINT)
    code, (out, err) = process.wait(60), process.said()
    assert code == 130 and "Traceback" not in err
    step = int(checkpoint.latest(tmp_path / "run").name.removeprefix("step_"))
    assert f"Stopped at step {step}; the same command goes on" in out
    assert max(figures(tmp_path)) == step - 1


@pytest.mark.parametrize("option", ["train.gradient_checkpointing=true", "hardware.mixed_precision=bf16"])
def test_options_train(tmp_path, option):
    run(config(tmp_path, "train.steps=2", option))
    assert len(figures(tmp_path)) == 2


def test_layers_to_checkpoint_are_named_or_numbered():
    model = build("titans_mag")
    model.config.mixers["attention"] = {"kind": "attention"}
    model.config.num_hidden_layers, model.config.mixer_pattern = 5, ["attention", "memory"]
    for chosen, layers in ((["memory"], [1, 3]), ([4, "memory"], [1, 3, 4]), (["attention", 0], [0, 2, 4])):
        checkpoint_layers(model, chosen)
        assert (model.model.gradient_checkpointing, model.model.checkpointed_layers) == (True, layers)
    backbone = AutoModelForCausalLM.from_config(LLAMA)
    with pytest.raises(ValueError, match=r"train.gradient_checkpointing=\[0\] names layers of memlm's decoder"):
        checkpoint_layers(backbone, [0])


# Dynamo reads the .grad of each input of a graph and makes objects of autograd functions, and hides the warnings of
# torch; as errors they come before it can hide them.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor", "ignore:.*should not be instantiated")
@pytest.mark.slow
@pytest.mark.parametrize("memory", ["titans_mag", "mom"])
def test_compiled_training_takes_the_same_step(tmp_path, memory):
    run(config(tmp_path / "eager", "train.steps=1", f"memory={memory}"))
    run(config(tmp_path / "compiled", "train.steps=1", f"memory={memory}", "hardware.compile=true"))
    for name in ("loss", "grad_norm", "validation/mqar/loss"):
        assert figures(tmp_path / "compiled", name) == pytest.approx(figures(tmp_path / "eager", name), rel=1e-4)


def test_every_parameter_is_in_one_group_and_decay_spares_the_rest():
    model = Objective(build(dtype=torch.float32))
    groups = parameter_groups(model)
    names = {id(p): name for name, p in model.named_parameters()}
    listed = [names[id(p)] for group in groups.values() for p in group]
    assert sorted(listed) == sorted(names.values())
    matrices = {names[id(p)].split(".")[-2] for p in groups["matrices"]}
    assert matrices == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "output_gate_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }
    assert [names[id(p)] for p in groups["head"]] == ["model.lm_head.weight"]
    rest = " ".join(names[id(p)] for p in groups["rest"])
    for part in (
        "embed_tokens",
        "norm",
        "gates.weight",
        "gates.bias",
        "conv.weight",
        "memory.store.memory.0",
        "persistent",
    ):
        assert part in rest
    _, muon = build_optimizers(model, optim_settings())
    assert isinstance(muon, torch.optim.Muon) and muon.param_groups[0]["params"] == groups["matrices"]
    (alone,) = build_optimizers(model, optim_settings("optim=adamw"))
    assert [g["weight_decay"] for g in alone.param_groups] == [0.1, 0.0]
    assert {id(p) for p in alone.param_groups[1]["params"]} == {id(p) for p in groups["rest"]}


def test_tied_heads_are_embeddings_and_never_decay():
    model = build(dtype=torch.float32)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert not parameter_groups(model)["head"]


def test_the_loss_weighs_rows_not_tokens():
    model = Objective(build(dtype=torch.float32))
    ids = torch.randint(259, (2, 30))
    labels = ids.clone()
    labels[1, :-2] = -100
    loss, rows, _ = model(ids, labels, None, 1)
    assert loss.item() == pytest.approx(rows.mean().item(), rel=1e-6)
    alone, _, _ = model(ids[1:], labels[1:], None, 1)
    assert alone.item() == pytest.approx(rows[1].item(), rel=1e-5)


def test_logits_of_scored_tokens_are_all_that_is_needed():
    """Rows with a few scored tokens, and one without any."""
    labels = torch.full((3, 40), -100)
    labels[0, [5, 39]], labels[1, 17] = torch.tensor([3, 4]), 0
    rows = [Row(torch.arange(40).numpy(), row.numpy(), torch.arange(40).numpy()) for row in labels]
    batch = Batch.from_rows(rows, [0, 0, 0])
    assert batch.places.tolist() == [4, 16, 38]
    model = Objective(build())
    inputs = model_inputs(batch, "cpu")
    few, everywhere = model(**inputs), model(**inputs | {"places": None})
    assert_close("loss", everywhere[0], few[0], 1e-12)
    assert_close("rows", everywhere[1], few[1], 1e-12)
    scores = [
        score(model.model, [b], ["x"], torch.ones(259), "cpu")["x"] for b in (batch, replace(batch, places=None))
    ]
    assert scores[0].told == scores[1].told == {}
    few, everywhere = ({**vars(s), "told": 0} for s in scores)
    assert few == pytest.approx(everywhere) and scores[0].tokens == 3
    labels[:, ::2] = 1
    assert (
        Batch.from_rows([r._replace(labels=x.numpy()) for r, x in zip(rows, labels, strict=True)], [0] * 3).places
        is None
    )


def test_a_run_goes_on_with_another_number_of_processes(tmp_path, capsys):
    """One process, then two, then one with two forwards per step: rows, losses and validation are those of one."""
    straight, changing = (tmp_path / name for name in ("straight", "changing"))
    run(config(straight, "train.steps=3"))
    schedule = "optim.schedule_steps=3"
    run(config(changing, "train.steps=1", schedule))
    options = [*SMALL, "train.steps=2", schedule, f"run_dir={changing}/run", f"data.cache_dir={changing}/cache"]
    with processes.command(tmp_path) as python:
        torchrun = ("-m", "torch.distributed.run", "--nproc_per_node", 2, ROOT / "train.py")
        done = processes.run(*torchrun, *options, env={**os.environ, "PYTHON_EXEC": str(python)})
    assert done.returncode == 0, done.stderr
    assert "changed since: train.steps 1 -> 2, processes 1 -> 2, each step still of 4 rows" in done.stdout
    run(config(changing, "train.steps=3", schedule, "train.micro_batch_size=2"))
    assert "processes 2 -> 1" in capsys.readouterr().out
    facts = json.loads((checkpoint.latest(changing / "run") / checkpoint.FACTS).read_text())
    assert (facts["step"], facts["processes"], facts["batch_size"], facts["forwards"]) == (3, 1, 4, 2)
    for name in ("loss", "loss/mqar", "loss/passkey", "grad_norm", "validation/mqar/loss"):
        one, several = (figures(folder, name) for folder in (straight, changing))
        assert {step: several[step] for step in one} == pytest.approx(one, rel=1e-5), name


def test_two_processes_train_what_the_loss_does_not_reach(tmp_path):
    """Plain text gives no gradient to a router of documents."""
    train(config(tmp_path, "memory=msa", "train.steps=2", "train.batch_size=2"), 2)


def test_muon_is_torchs_but_for_rounding():
    """Several shapes, one of them three times. torch's Muon rounds to bf16, so updates differ by less than 0.01."""
    torch.manual_seed(0)
    shapes = [(64, 64), (176, 64), (64, 64), (8, 100), (64, 64)]
    ours = [torch.nn.Parameter(torch.randn(s)) for s in shapes]
    theirs = copy.deepcopy(ours)
    start = [p.detach().clone() for p in ours]
    options = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.1}
    mine, torchs = Muon(ours, **options), torch.optim.Muon(theirs, **options)
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        mine.step()
        torchs.step()
    for p, q, s in zip(ours, theirs, start, strict=True):
        assert relative_error(q - s, p - s) < 1e-2
    state, expected = mine.state_dict()["state"], torchs.state_dict()["state"]
    assert all(torch.equal(state[i]["momentum_buffer"], expected[i]["momentum_buffer"]) for i in range(5))
