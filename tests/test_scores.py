"""Losses of tokens whose logits never exist all at once: equal to those of whole logits, in less memory."""

import copy
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Gemma2Config

import memlm
from memlm import MemLMForCausalLM
from memlm.data import Batch, Row
from memlm.training import scores
from memlm.training.model import without_dropout
from memlm.training.objective import Objective, score
from tests.conftest import build, model_config
from tests.ranks import train
from tests.runs import config, figures
from tests.test_any_model import GPT2, LLAMA

ROWS, LENGTH, VOCABULARY = 3, 21, 259
GEMMA = Gemma2Config(
    **{"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "final_logit_softcapping": 2.0},
)


@pytest.fixture
def pieces(monkeypatch):
    """Changes the number of tokens whose logits, which are fp32, exist at once."""
    return lambda tokens: monkeypatch.setattr(scores, "LOGITS", tokens * VOCABULARY)


def inputs(places=False):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, -100)
    labels[0], few = -100, torch.tensor([2, 5, 6, 19])
    given = {"input_ids": ids, "labels": labels, "position_ids": None, "max_documents": 1}
    return given | ({"places": few} if places else {})


def of_transformers(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double()
    without_dropout(model)
    return model


def tied():
    config = model_config()
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    return MemLMForCausalLM(config).double()


def frozen():
    model = build()
    model.lm_head.requires_grad_(False)
    return model


def with_a_memory():
    return memlm.attach(of_transformers(LLAMA), {"kind": "gated_delta_net"}).double()


def with_lora():
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    return peft.get_peft_model(of_transformers(LLAMA), adapter).double()


MODELS = {
    "titans_mag": build,
    "mom": lambda: build("mom", z_loss=0.5),
    **{"tied": tied, "frozen": frozen, "attached": with_a_memory, "lora": with_lora},
    "gpt2": lambda: of_transformers(GPT2),
    "softcapped": lambda: of_transformers(GEMMA),
}


def step(model, z_loss=0.0, **given):
    objective = Objective(copy.deepcopy(model).train(), 0.7, z_loss)
    loss, rows, told = objective(**given)
    loss.backward()
    found = {n: p.grad for n, p in objective.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "rows": rows, **told, **found}


# peft uses transformers' old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(
    ("name", "z_loss"),
    [
        pytest.param(name, z_loss, marks=[] if z_loss or name == "tied" else pytest.mark.slow)
        for name in MODELS
        for z_loss in (0.0, 0.1)
    ],
)
def test_pieces_give_the_losses_and_gradients_of_whole_logits(pieces, name, z_loss):
    model = MODELS[name]()
    for places in (False, True):
        pieces(10**6)
        whole = step(model, z_loss, **inputs(places))
        assert ("z_loss" in whole) == (z_loss > 0)
        for tokens in (5, 1):
            pieces(tokens)
            got = step(model, z_loss, **inputs(places))
            assert got.keys() == whole.keys()
            for key, x in whole.items():
                # Scores are fp32: 8 units in the last place of the largest number.
                torch.testing.assert_close(got[key], x, rtol=0, atol=1e-6 * x.abs().max().item(), msg=key)


def test_z_loss_is_the_mean_over_rows_of_the_squared_log_of_the_denominator():
    model, given = build(), inputs()
    logits = model(given["input_ids"]).logits[:, :-1].exp().sum(-1).log()
    counted = given["labels"][:, 1:] != -100
    of_rows = [(x[of].square().mean() if of.any() else x.new_zeros(())) for x, of in zip(logits, counted, strict=True)]
    found = step(model, 0.1, **given)
    assert found["z_loss"].item() == pytest.approx(0.1 * torch.stack(of_rows).mean().item(), rel=1e-6)
    assert found["loss"].item() == pytest.approx((0.7 * found["rows"].mean() + found["z_loss"]).item(), rel=1e-12)


def test_scores_of_an_evaluation_are_the_same_in_pieces(pieces):
    model, given = build(dtype=torch.float32), inputs()
    pairs = zip(given["input_ids"].numpy(), given["labels"].numpy(), strict=True)
    rows = [Row(*pair, torch.arange(LENGTH).numpy()) for pair in pairs]
    batch, found = Batch.from_rows(rows, [0, 1, 0]), []
    for tokens in (10**6, 4):
        pieces(tokens)
        found.append(score(model, [batch], ["a", "b"], torch.ones(VOCABULARY), torch.device("cpu")))
    for name, whole in found[0].items():
        assert found[1][name].nats == pytest.approx(whole.nats, rel=1e-6)
        assert vars(found[1][name]) | {"nats": 0} == vars(whole) | {"nats": 0}


def headless():
    """Embeddings and a head."""
    model = build("none", torch.float32)
    model.model.layers = torch.nn.ModuleList()
    return model.train()


def test_pieces_under_autocast(pieces):
    found = []
    for tokens in (10**6, 5):
        pieces(tokens)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(step(headless(), **inputs()))
    whole, got = found
    assert got["loss"].item() == pytest.approx(whole["loss"].item(), rel=1e-5)
    for name, x in whole.items():
        assert (got[name] - x).norm() <= 2e-2 * x.norm(), name


@pytest.mark.slow
# As in test_compile.py.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor", "ignore:.*should not be instantiated")
def test_a_step_in_pieces_compiles_to_one_graph(pieces):
    pieces(25)
    torch.compiler.reset()
    objective = Objective(headless())
    objective(**inputs())[0].backward()
    eager = [p.grad for p in objective.parameters()]
    objective.zero_grad()
    compiled = torch.compile(objective, backend="aot_eager", fullgraph=True)
    compiled(**inputs())[0].backward()
    torch.testing.assert_close([p.grad for p in objective.parameters()], eager, rtol=1e-5, atol=1e-7)


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors that were made in the block and lived at once."""

    def __init__(self):
        super().__init__()
        self.live, self.most, self.known = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        def storages(values):
            return {x.untyped_storage()._cdata: x.untyped_storage() for x in tree_leaves(values) if hasattr(x, "data")}

        given, out = storages((args, kwargs)), function(*args, **(kwargs or {}))
        for key, storage in storages(out).items():
            if key not in given and key not in self.known:
                self.known.add(key)
                self.live += storage.nbytes()
                self.most = max(self.most, self.live)
                weakref.finalize(storage, self.gone, key, storage.nbytes())
        return out

    def gone(self, key, size):
        self.known.discard(key)
        self.live -= size


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_pieces_need_less_than_half_of_the_memory(pieces, z_loss):
    model, peaks = headless(), []
    ids = torch.randint(VOCABULARY, (4, 512))
    for tokens in (10**6, 128):
        pieces(tokens)
        with LiveBytes() as peak:
            Objective(model, z_loss=z_loss)(ids, ids, None, 1)[0].backward()
        model.zero_grad()
        peaks.append(peak.most)
    assert peaks[0] > 3 * 4 * ids.numel() * VOCABULARY
    assert peaks[1] < peaks[0] / 2


def few_logits(patch):
    patch.setattr(scores, "LOGITS", 30 * VOCABULARY)


@pytest.mark.slow
@pytest.mark.parametrize("hardware", ["cpu", "fsdp2", "fsdp2_checkpointed"])
def test_pieces_on_two_processes_take_the_steps_of_one(tmp_path, hardware):
    """Each with a copy, by DDP, or with a share of the parameters, by FSDP2."""
    name, _, checkpointed = hardware.partition("_")
    options = ("train.steps=5", "train.z_loss=0.01", f"train.gradient_checkpointing={str(bool(checkpointed)).lower()}")
    train(config(tmp_path / "one", *options))
    train(config(tmp_path / "two", *options, f"hardware={name}"), 2, few_logits)
    for figure, tolerance in (("loss", 1e-6), ("grad_norm", 1e-5)):
        one, two = (figures(tmp_path / folder, figure) for folder in ("one", "two"))
        assert len(one) == 5 and two == pytest.approx(one, rel=tolerance)
