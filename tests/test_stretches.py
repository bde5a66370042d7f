"""Rows cut over processes equal whole rows, outputs and every gradient, whatever the memory is."""

import pytest
import torch
import torch.distributed as dist

from memlm import MemoryCache
from memlm.memory.stretches import Stretches
from memlm_kernels.testing import relative_error
from tests import ranks
from tests.conftest import build, variants

LENGTH, VOCAB, EXACT = 40, 259, 1e-12
# Memories without their near relatives, which the slow test has.
DIFFERENT = ("bmojo", "chunk_sparse", "comba", "gla", "kda", "lact", "momentum_delta_net", "msa", "none", "omeganet")
DIFFERENT += ("titans_mac", "titans_mag_deep", "titans_tnt", "two_rate")
SLOW = [variant.values[0] for variant in variants()]


@pytest.fixture
def alone(tmp_path):
    """A group of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield Stretches(dist.group.WORLD)
    dist.destroy_process_group()


def inputs(form):
    """Two rows: of one document; of several; with padding, which no cut is near; or with both."""
    ids = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    given, mask = {}, torch.ones(2, LENGTH, dtype=torch.long)
    if "padded" in form:
        mask[0, 5:9], mask[1, :2], mask[1, 18:33] = 0, 0, 0
        given["attention_mask"] = mask
    if "packed" in form:
        positions = torch.zeros_like(ids)
        for row, sizes in enumerate(([14, 1, 17, 8], [3, 30, 7])):
            places = torch.cat([torch.arange(size) for size in sizes])
            real = mask[row].bool()
            positions[row, real] = places[: int(real.sum())]
        given |= {"position_ids": positions, "max_documents": 4}
    return ids, given, mask[..., None]


def part(x, rank, size):
    """A process's stretch of x [B, T, ...]."""
    return x.chunk(size, 1)[rank] if isinstance(x, torch.Tensor) else x


def loss_of(model, form, rank=0, size=1):
    """Outputs of the real tokens of a stretch; their loss is backpropagated."""
    ids, given, mask = inputs(form)
    weights = torch.randn(2, LENGTH, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * mask
    out = model(part(ids, rank, size), **{k: part(x, rank, size) for k, x in given.items()})
    logits = out.logits
    losses = sum(x.sum() for x in out.aux_losses.values()) / size
    ((logits * part(weights, rank, size)).sum() + losses).backward()
    return logits.detach() * part(mask, rank, size)


def gradients(model):
    """The gradient of each module's own parameters together: that of a bias alone may be a sum that cancels."""
    found = {}
    for name, module in model.named_modules():
        if own := [p for p in module.parameters(recurse=False)]:
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in own]
            found[name] = torch.cat([grad.flatten() for grad in grads])
    return found


def of_whole_rows(variant, form):
    """A model, and its outputs and gradients."""
    name, settings = variant
    model = build(name, **settings).train()
    whole = loss_of(model, form)
    expected = gradients(model)
    model.zero_grad()
    return model, form, whole, expected


def compare(rank, size, model, form, whole, expected):
    """The largest error of outputs and gradients; how much outputs change without an exchange; and the messages and
    bytes that this process sends."""
    stretches = Stretches(dist.group.WORLD)
    with torch.no_grad():
        ids, given, mask = inputs(form)
        alone = model(
            part(ids, rank, size), **{k: part(x, rank, size) for k, x in given.items() if k != "position_ids"}
        )
    alone = alone.logits * part(mask, rank, size)
    model.model.stretches = stretches
    mine = loss_of(model, form, rank, size)
    errors, found = [relative_error(part(whole, rank, size), mine)], gradients(model)
    summed = torch.cat([*found.values()])
    dist.all_reduce(summed)
    for module, grad in zip(found, summed.split([len(grad) for grad in found.values()]), strict=True):
        errors.append(relative_error(expected[module], grad) if expected[module].any() else float(grad.abs().max()))
    sent = stretches.messages, stretches.bytes
    return max(errors), relative_error(part(whole, rank, size), alone), sent


def work(rank, size, cases):
    """cases: a file of what ``of_whole_rows`` returns for each."""
    # Messages arrive though the model that sent them is gone.
    for name in ("lact", "gated_delta_net", "lact"):
        model = build(name)
        model.model.stretches = Stretches(dist.group.WORLD)
        loss_of(model, "plain", rank, size)
        del model
    dist.barrier()
    return [compare(rank, size, *case) for case in torch.load(cases, weights_only=False)]


def check(folder, size, cases):
    torch.save([of_whole_rows(*case) for case in cases], folder / "whole.pt")
    results = ranks.run(work, size, folder, folder / "whole.pt")
    for rank, found in enumerate(results):
        for case, (error, alone, _) in zip(cases, found, strict=True):
            assert error < EXACT, (case, rank, error)
            # The comparison can fail.
            assert rank == 0 or alone > 1e-4, (case, rank, alone)
    return [[sent for *_, sent in found] for found in results]


def test_stretches_on_two_processes_equal_whole_rows(tmp_path):
    """And memories that are linear in their state send one message each way, windows one to the next process."""
    counted = [
        ("simple_gla", {"conv_size": 1}),
        ("gated_delta_net", {"conv_size": 1}),
        ("attention", {"window_size": 9}),
    ]
    routed = {"z_loss": 0.1, "balance_bias": True, "window_size": 8, "rule": "titans", "chunk_size": 4}
    cases = [(case, "plain") for case in counted]
    cases += [((name, {}), "packed and padded") for name in DIFFERENT]
    distilled = {"learning": "distilled", "chunk_size": 4, "window_size": 6, "loss_weight": 100.0}
    sent = check(
        tmp_path,
        2,
        [*cases, (("mom", routed), "packed and padded"), (("chunk_sparse", distilled), "packed and padded")],
    )
    rows, layers, fp64 = 2, 2, 8
    of_rule = build("simple_gla").model.layers[0].mixer.config
    keys, state = of_rule.num_heads * of_rule.head_dim, of_rule.num_heads * of_rule.head_dim**2
    dims = build("attention").config.dims()
    # T of simple_gla is diagonal, that of gated_delta_net a matrix; the gradient of the state returns.
    numbers = [keys + 2 * state, state + 2 * state, 8 * 2 * dims.num_key_value_heads * dims.head_dim]
    for rank in (0, 1):
        for (messages, size), each, of_layer in zip(sent[rank], (2, 2, 1), numbers, strict=False):
            assert messages == each * layers
            assert size == rows * layers * fp64 * of_layer


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_stretches_of_every_variant_equal_whole_rows(size, tmp_path):
    check(tmp_path, size, [(v, form) for v in SLOW for form in ("plain", "packed and padded")])


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"use_cache": True}, "use_cache"),
        ({"past_key_values": MemoryCache()}, "past_key_values"),
        ({"labels": torch.zeros(1, 4, dtype=torch.long)}, "labels"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_stretch_refuses_arguments_of_whole_rows(given, told, alone):
    model = build("none")
    model.model.stretches = alone
    with pytest.raises(ValueError, match=f"sequence parallelism: .*{told}"):
        model(torch.zeros(1, 4, dtype=torch.long), **given)


def test_a_stretch_refuses_losses_of_layers_that_hand_states_on(alone):
    model = build("lact").train()
    model.model.stretches = alone
    loss = {"own": torch.zeros(1)}
    model.model.layers[1].register_forward_hook(lambda *given: given[2]._replace(aux_losses=loss))
    with pytest.raises(ValueError, match="sequence parallelism: layer1/own is a loss of whole rows"):
        model(torch.zeros(1, 4, dtype=torch.long))


def test_a_stretch_refuses_convolutions_of_all_rows(alone):
    model = build("mom", conv_across_segments=True).train()
    model.model.stretches = alone
    with pytest.raises(ValueError, match=r"conv_across_segments=true .* set it to false"):
        model(torch.zeros(1, 4, dtype=torch.long))
