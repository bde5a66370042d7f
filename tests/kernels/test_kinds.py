"""Work that a call of a known kind leaves out: checks that passed, and torch's dispatcher."""

import gc
import weakref

import pytest
import torch
from torch.autograd.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from memlm_kernels import delta_rule, short_convolution
from memlm_kernels.calls import CALLS, DEVICE
from memlm_kernels.checks import check_tensors, once_a_kind
from memlm_kernels.testing import assert_close


@pytest.fixture
def counted():
    """A function of a tensor and what else, that runs once for each kind, and its runs."""
    runs = []

    @once_a_kind
    def function(x, *more):
        runs.append(x)
        if x is not None and x.ndim != 2:
            raise ValueError("x must have two dimensions")
        return len(runs)

    return function, runs


def test_a_kind_is_shapes_types_devices_and_values(counted):
    function, runs = counted
    x = torch.zeros(2, 3)
    kinds = [
        (x,),
        (torch.zeros(2, 4),),
        (x.double(),),
        (x.to("meta"),),
        (x, 1),
        (x, [x]),
        (x, [x, x]),
        (x, {"a": x}),
        (x, {"b": x}),
        (x, None),
        (None, x),
    ]
    first = [function(*kind) for kind in kinds]
    assert first == [*range(1, len(kinds) + 1)]
    assert [function(*kind) for kind in kinds] == first and len(runs) == len(kinds)
    assert function(torch.ones(2, 3)) == 1 and function(torch.nn.Parameter(x)) == 1


def test_a_wrong_kind_is_refused_each_time(counted):
    function, _ = counted
    for _ in "ab":
        with pytest.raises(ValueError, match="two dimensions"):
            function(torch.zeros(3))


def test_tensors_of_a_kind_are_not_kept(counted):
    class Special(torch.Tensor):
        pass

    function, runs = counted
    x = torch.zeros(2, 3).as_subclass(Special)
    gone = weakref.ref(x)
    assert function(x, [x]) == function(torch.zeros(2, 3).as_subclass(Special), [x]) == 1
    runs.clear()
    del x
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("kind", ["delta_rule, decay", "neural_memory", "short_convolution", "rms_norm", "rotary"])
def test_a_right_call_does_not_let_a_wrong_one_pass(kind):
    """Each tensor in turn loses its last entries, or becomes fp64."""
    call = CALLS[kind]
    tensors = call.make()
    call.run(tensors)
    for name in call.floats:
        x = tensors[name]
        for wrong in (x[..., :-1], x.double()):
            if x.numel() > 1:
                with pytest.raises(ValueError):
                    call.run(tensors | {name: wrong})
    call.run(tensors)


def test_indices_are_read_in_each_call():
    call = CALLS["delta_rule, decay"]
    tensors = call.make()
    call.run(tensors)
    with pytest.raises(ValueError, match="cu_seqlens has numbers"):
        call.run(tensors | {"cu_seqlens": tensors["cu_seqlens"] + 100})


def test_modes_profilers_and_transforms_see_an_op():
    """They see it through torch's dispatcher; where nobody looks, its function runs as it is, with the same result."""
    pytest.importorskip("triton", reason="Triton is not installed: pip install -e '.[cpu-kernels]'")
    import memlm_kernels.recurrence.step

    op = memlm_kernels.recurrence.step.step
    q, k, v, beta = (torch.rand(2, 1, 3, *size, device=DEVICE) for size in ((8,), (8,), (5,), ()))

    def call(q=q):
        with torch.no_grad():
            return delta_rule(q, k, v, beta, backend="triton").o

    dispatched = []
    original, op.overload = op.overload, lambda *given: dispatched.append(1) or original(*given)
    try:
        alone = call()
        assert dispatched == []
        with FlopCounterMode(display=False) as flops:
            assert_close("o", alone, call(), 0.0)
        assert flops.get_total_flops() > 0 and len(dispatched) == 1
        with profile() as names:
            call()
        assert any("recurrence_step" in x.key for x in names.key_averages()) and len(dispatched) == 2
        assert_close("o", alone, torch.func.vmap(call)(q[None])[0], 0.0)
        assert len(dispatched) == 3
    finally:
        op.overload = original


def test_a_gradient_goes_through_the_op():
    pytest.importorskip("triton", reason="Triton is not installed: pip install -e '.[cpu-kernels]'")
    x, weight = torch.rand(2, 5, 6, device=DEVICE, requires_grad=True), torch.rand(6, 3, device=DEVICE)
    state = torch.zeros(2, 2, 6, device=DEVICE)
    (y,), _ = short_convolution([x], weight, state=state, backend="triton")
    assert y.grad_fn is not None
    (y,), _ = short_convolution([x.detach()], weight, state=state, backend="triton")
    assert y.grad_fn is None


def test_tensors_that_disagree_are_named():
    with pytest.raises(ValueError, match="q is on cpu, k on meta; move them to one device"):
        check_tensors({"q": torch.zeros(1), "k": torch.zeros(1, device="meta")})
