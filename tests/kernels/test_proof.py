"""Trials of Triton's kernels, and the verdicts that ``auto`` keeps; in Triton's interpreter, with a stubbed GPU."""

import json
import logging
import multiprocessing
import operator
import os
import shutil
import types
from pathlib import Path

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import BackendCompilerFailed

from memlm_kernels import (
    backend,
    choose,
    delta_rule,
    dispatch_tokens,
    prefix_window_attention,
    proof,
    set_backend,
    trial,
)
from memlm_kernels.calls import CALLS
from tests.conftest import MEMORIES, build

pytest.importorskip("triton", reason="Triton is not installed: pip install -e '.[cpu-kernels]'")

CPU, GPU, HALF = torch.device("cpu"), torch.device("cuda", 0), torch.float16
KIND = proof.Claim("merge_topk", torch.float32, ())
PASSED = {"fault": None, "error": 0.4, "kernels": ["memlm_kernels.some.kernel"]}


@pytest.fixture
def hopper(monkeypatch, tmp_path):
    """An empty cache, and a GPU of which only the name is known."""
    gpu = types.SimpleNamespace(major=9, minor=0, gcnArchName="")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(proof, "_ptxas", lambda device: "12.8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget(monkeypatch)
    return tmp_path / "memlm"


def forget(monkeypatch):
    """As a new process begins."""
    monkeypatch.setattr(proof, "_found", {})
    monkeypatch.setattr(proof, "ways", type(proof.ways)(lambda: proof.FIRST))
    proof.surroundings.cache_clear()


@pytest.fixture
def tried(monkeypatch):
    """The trials that were held; each gives ``answers`` of its way, or passes."""
    held, answers = [], {}

    def one(kind, device, way):
        held.append((str(kind), way))
        return answers.get(way, PASSED)

    monkeypatch.setattr(proof, "_tried", one)
    return types.SimpleNamespace(held=held, answers=answers)


def test_a_call_of_every_op_and_of_every_kind_of_verdict():
    """Ops ask for the verdicts of calls that exist, and each op with kernels has one."""
    # On a CPU it has a faster backend that needs no trial.
    asked = {"grouped_linear"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "missing_triton", lambda device: None)
        patch.setattr(backend, "against_triton", lambda call, *x, **y: asked.add(call) or "a test")
        for name, call in CALLS.items():
            if call.triton:
                call.run(call.make(device="cpu"), backend="auto")
                assert name in asked
    assert asked == {name for name, call in CALLS.items() if call.triton}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("combine_reads", HALF), ("chunk_mean_attention", torch.float32), ("merge_topk", torch.float32)],
)
def test_right_kernels_pass(name, dtype):
    result = trial.trial(proof.Claim(name, dtype, (16, 20) if CALLS[name].products else ()), CPU)
    assert result["fault"] is None and result["error"] < 0.5 and result["kernels"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("name", [name for name, call in CALLS.items() if call.triton])
def test_all_kernels_pass(name, dtype):
    result = trial.trial(proof.Claim(name, dtype, (16, 16) if CALLS[name].products else ()), CPU)
    assert result["fault"] is None and result["error"] < 0.5 and result["kernels"]


def test_wrong_kernels_are_refused(monkeypatch):
    """One is 5 % off, one leaves an entry wrong or unwritten, one differs from call to call, one writes nothing."""
    from memlm_kernels.launch import Kernel

    run, calls = Kernel.__call__, []

    def fault(change):
        def changed(kernel, *x, rows, **arguments):
            calls.append(kernel.name)
            run(kernel, *x, rows=rows, **arguments)
            if kernel.name.endswith("spread"):
                change(rows.view(-1))

        monkeypatch.setattr(Kernel, "__call__", changed)
        return trial.trial(proof.Claim("dispatch_tokens", HALF, ()), CPU)["fault"]

    assert fault(lambda rows: None) is None
    assert "output 0 is 0.05 off" in fault(lambda rows: rows.mul_(1.05))
    assert "an entry of output 0 is" in fault(lambda rows: rows[7:8].add_(0.02))
    assert "output 0 is inf off" in fault(lambda rows: rows[7:8].fill_(float("nan")))
    assert "output 0 differs between equal calls" in fault(lambda rows: rows[:9].mul_(1 + 1e-3 * (len(calls) % 3)))
    monkeypatch.setattr(Kernel, "__call__", lambda kernel, *x, **y: None)
    assert "output 0 is inf off" in trial.trial(proof.Claim("dispatch_tokens", HALF, ()), CPU)["fault"]


@pytest.mark.slow
def test_wrong_source_is_refused(hopper, monkeypatch, tmp_path):
    """All of it: other processes, each way, the reference."""
    copy = shutil.copytree(Path(proof.__file__).parent, tmp_path / "memlm_kernels")
    source = copy / "routed_memory" / "kernels.py"
    source.write_text(source.read_text().replace("tl.store(rows + at, b_x, ", "tl.store(rows + at, b_x * 1.05, "))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(proof, "__file__", str(copy / "proof.py"))
    found = proof.verdict(proof.Claim("dispatch_tokens", HALF, ()), CPU)
    assert found.tried.keys() == {proof.FIRST, proof.SAFE} and found.lasting
    assert all("output 0 is 0.05 off" in fault for fault in found.tried.values())


def test_the_first_call_tries_and_later_ones_remember(hopper, tried, caplog, monkeypatch):
    ask = lambda: proof.against("delta_rule", HALF, (64, 64), GPU)  # noqa: E731
    with caplog.at_level(logging.INFO, logger=proof.__name__):
        assert ask() is ask() is None
        assert tried.held == [("delta_rule, float16, 64x64", proof.FIRST)]
        forget(monkeypatch)
        assert ask() is None and len(tried.held) == 1
    (line,) = caplog.messages
    assert line.startswith("delta_rule, float16, 64x64: Triton's kernels passed their trial on sm_90 (Triton ")
    proof.against("delta_rule", HALF, (64, 128), GPU)
    proof.against("delta_rule", torch.bfloat16, (64, 64), GPU)
    assert len(tried.held) == 3 and len(list(hopper.rglob("*.json"))) == 3


def test_what_fails_is_tried_in_slower_ways(hopper, tried, caplog, monkeypatch):
    tried.answers[proof.FIRST] = {"fault": "output 0 is 0.3 off"}
    assert proof.against("delta_rule", HALF, (64, 64), GPU) is None
    assert proof.ways["memlm_kernels.some.kernel"] == proof.SAFE
    forget(monkeypatch)
    assert proof.against("delta_rule", HALF, (64, 64), GPU) is None
    assert proof.ways["memlm_kernels.some.kernel"] == proof.SAFE
    tried.answers[proof.SAFE] = {"fault": "the process ended with -11"}
    assert proof.against("linear_attention", HALF, (64, 64), GPU) is None
    assert proof.ways["memlm_kernels.some.kernel"] == proof.PLAIN
    # A kind whose kernels passed in a faster way leaves the slower one.
    tried.answers.clear()
    assert proof.against("merge_topk", HALF, (), GPU) is None
    assert proof.ways["memlm_kernels.some.kernel"] == proof.PLAIN
    assert "with 4 warps and 1 stage; first tiles: output 0 is 0.3 off. Triton" not in caplog.text
    assert "ptxas 12.8 is known to reuse registers" in caplog.text


def test_what_fails_in_all_ways_is_refused_with_the_reasons(hopper, tried, caplog, monkeypatch):
    tried.answers |= {way: {"fault": f"fault {i}"} for i, way in enumerate(proof.WAYS)}
    reason = proof.against("delta_rule", HALF, (64, 64), GPU)
    for i, way in enumerate(proof.WAYS):
        assert f"{way}: fault {i}" in reason and f"{way}: fault {i}" in caplog.text
    assert "delta_rule, float16, 64x64: auto takes the reference on sm_90 (Triton" in caplog.text
    forget(monkeypatch)
    assert proof.against("delta_rule", HALF, (64, 64), GPU) == reason and len(tried.held) == 3
    # Older GPUs have no other instructions for products.
    monkeypatch.setattr(proof, "architecture", lambda device: "sm_80")
    proof.against("merge_topk", HALF, (), GPU)
    assert [way for _, way in tried.held[3:]] == [proof.FIRST, proof.SAFE]


def test_what_could_not_be_tried_is_not_kept(hopper, tried, monkeypatch):
    tried.answers[proof.FIRST] = {"unable": "OutOfMemoryError: none left"}
    assert "OutOfMemoryError: none left" in proof.against("delta_rule", HALF, (64, 64), GPU)
    assert proof.against("delta_rule", HALF, (64, 64), GPU) and len(tried.held) == 1
    forget(monkeypatch)
    tried.answers.clear()
    assert proof.against("delta_rule", HALF, (64, 64), GPU) is None


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"way": "first tiles"}', "ÿ", '{"surroundings": 1, "kind": 2, "way": 3}']
)
def test_a_corrupt_file_is_another_trial(hopper, tried, text, monkeypatch):
    proof.verdict(KIND, GPU)
    (path,) = hopper.rglob("*.json")
    path.write_text(text)
    forget(monkeypatch)
    assert proof.verdict(KIND, GPU).way == proof.FIRST and len(tried.held) == 2
    assert json.loads(path.read_text())["way"] == proof.FIRST


@pytest.mark.parametrize("changed", ["torch", "triton", "ptxas", "kernels", "settings", "architecture"])
def test_verdicts_of_other_versions_do_not_count(hopper, tried, changed, monkeypatch):
    proof.verdict(KIND, GPU)
    here = proof.surroundings(GPU)
    forget(monkeypatch)
    monkeypatch.setattr(proof, "surroundings", lambda device: here | {changed: "another"})
    assert proof.known(KIND, GPU) is None
    # Nor where the file of this one has another's content.
    (path,) = hopper.rglob("*.json")
    monkeypatch.setattr(proof, "_file", lambda kind, here: path)
    assert proof.known(KIND, GPU) is None
    monkeypatch.setattr(proof, "surroundings", lambda device: here)
    assert proof.known(KIND, GPU).way == proof.FIRST


def test_a_changed_source_is_another_version(hopper, monkeypatch, tmp_path):
    before = proof.surroundings(GPU)["kernels"]
    (tmp_path / "kernel.py").write_text("x = 1")
    monkeypatch.setattr(proof, "__file__", str(tmp_path / "proof.py"))
    proof.surroundings.cache_clear()
    assert proof.surroundings(GPU)["kernels"] != before
    proof.surroundings.cache_clear()


def test_a_home_that_cannot_be_written_is_no_error(hopper, tried, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    for home in (tmp_path / "file", tmp_path / "file" / "below"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(home))
        forget(monkeypatch)
        tried.held.clear()
        assert proof.verdict(KIND, GPU).way == proof.verdict(KIND, GPU).way == proof.FIRST
        assert len(tried.held) == 1


def _write_many(home, start, barrier):
    os.environ["XDG_CACHE_HOME"] = home
    proof.surroundings = lambda device: {"architecture": "sm_90", "triton": "3", "ptxas": ""}
    barrier.wait()
    for i in range(40):
        for name in ("shared", f"own {start}"):
            verdict = proof.Verdict(proof.FIRST, {"way": "x" * 5000}, float(i))
            proof._write(proof.Claim(name, torch.float32, (i % 4,)), CPU, verdict)
            assert proof.known(proof.Claim(name, torch.float32, (i % 4,)), CPU) is not None


def test_two_processes_at_once(hopper, monkeypatch):
    """Neither loses a verdict, and none reads half a file."""
    fork = multiprocessing.get_context("fork")
    barrier = fork.Barrier(2)
    home = str(hopper.parent)
    processes = [fork.Process(target=_write_many, args=(home, i, barrier)) for i in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(list(hopper.rglob("*.json"))) == 12 and not list(hopper.rglob("*.tmp"))


def test_a_trial_in_another_process(hopper, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("MEMLM_AUTOTUNE", "1")
    found = proof.verdict(KIND, CPU)
    assert found.way == proof.FIRST and not found.tried and found.lasting
    assert found.kernels == ("memlm_kernels.route_documents.kernels.choose_best",)


def test_what_the_kernels_do_not_take_is_no_fault(capsys):
    trial.main({"call": "delta_rule", "dtype": "float32", "channels": [300, 300], "device": "cpu", "way": proof.FIRST})
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "cannot run here: its kernels take keys" in answer["unable"] and "fault" not in answer


@pytest.mark.parametrize(
    ("answer", "lasting", "reason"),
    [
        ('import os; print(\'{"trial": "began"}\', flush=True); os._exit(9)', True, "the process ended with 9"),
        ("raise MemoryError('no GPU memory')", False, "MemoryError: no GPU memory"),
        ("import time; time.sleep(60)", False, "no answer in 0.5 seconds"),
    ],
)
def test_a_kernel_that_faults_ends_only_the_trial(hopper, monkeypatch, answer, lasting, reason):
    run = proof.subprocess.run
    monkeypatch.setattr(proof, "PATIENCE", 0.5 if "sleep" in answer else 60)
    monkeypatch.setattr(proof.subprocess, "run", lambda command, **y: run([command[0], "-S", "-c", answer], **y))
    found = proof.verdict(KIND, CPU)
    assert reason in found.reason and found.lasting is lasting


def test_nothing_is_tried_within_a_cuda_graph(hopper, tried, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "a CUDA graph is captured" in proof.against("delta_rule", HALF, (64, 64), GPU)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert proof.against("delta_rule", HALF, (64, 64), GPU) is None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert proof.against("delta_rule", HALF, (64, 64), GPU) is None and len(tried.held) == 1


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """``auto`` decides on GPU tensors as on a GPU's."""
    decide = backend.against_triton

    def on_a_gpu(call, *tensors, products=True):
        place = {"device": GPU, "is_cpu": False}
        stubs = [
            None
            if x is None
            else types.SimpleNamespace(
                **place, dtype=x.dtype, shape=x.shape, **{"is_floating_point": x.is_floating_point}
            )
            for x in tensors
        ]
        return decide(call, *stubs, products=products)

    monkeypatch.setattr(backend, "against_triton", on_a_gpu)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_first_call_may_be_a_compiled_one(tried, monkeypatch, caplog, dynamic):
    """The trial, the precision of products and the lines of the log break no graph, and happen once."""
    monkeypatch.setattr(backend, "_announced", set())

    def op(x):
        assert backend.exact_products(x)
        reason = proof.against("segment_mean_pool", x.dtype, (operator.index(x.shape[-1]),), x.device)
        return x + 1 if choose("pool", "auto", ("reference" if reason else "triton", "reference")) == "triton" else x

    compiled = torch.compile(op, backend="eager", fullgraph=True, dynamic=dynamic)
    with caplog.at_level(logging.INFO, logger="memlm_kernels"):
        for length in (3, 4, 5):
            assert compiled(torch.zeros(length, 16)).sum() == 16 * length
    assert len(tried.held) == 1 and [x.split(":")[0] for x in caplog.messages] == [
        "segment_mean_pool, float32, 16",
        "pool",
    ]


class Traced(Exception):
    pass


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
@pytest.mark.parametrize(
    "name",
    [
        # Those take seconds.
        pytest.param(name, marks=pytest.mark.slow if "neural_memory" in name else ())
        for name, call in CALLS.items()
        if call.triton
    ],
)
def test_no_op_breaks_a_graph(name):
    """Forward and backward of the kernels' path are traced whole; nothing is compiled or run."""
    call, graphs = CALLS[name], []

    def stop(graph, inputs):
        graphs.append(graph)
        raise Traced

    tensors = call.make(8, device="cpu")
    for float_name in call.floats:
        tensors[float_name].requires_grad_()
    compiled = torch.compile(
        lambda **x: call.run(x, backend="triton"), backend=aot_autograd(fw_compiler=stop), fullgraph=True
    )
    with pytest.raises(BackendCompilerFailed, match="Traced"):
        compiled(**tensors)
    torch.compiler.reset()
    assert "memlm" in graphs[0].code


@pytest.mark.usefixtures("hopper", "as_on_a_gpu")
def test_only_auto_tries(tried):
    x, place = torch.rand(1, 3, 1, 4), torch.arange(3).view(1, 3, 1)
    for given, setting in (("reference", "auto"), ("triton", "auto"), ("auto", "reference"), ("auto", "triton")):
        with set_backend(setting):
            dispatch_tokens(x, place, backend=given)
    q = torch.rand(1, 3, 1, 4)
    # fp32 products are exact, so no kernel is in question.
    delta_rule(q, q, q, q[..., 0])
    assert not tried.held
    dispatch_tokens(x, place)
    assert tried.held == [("dispatch_tokens, float32", proof.FIRST)]


def test_proven_machines_need_no_trial(hopper, tried, monkeypatch):
    here = proof.surroundings(GPU)
    for changed in (("sm_90", here["triton"], "13.1"), ("sm_90", "3.0", "12.8"), ("sm_80", here["triton"], "12.8")):
        monkeypatch.setattr(proof, "PROVEN", frozenset({changed}))
        assert proof.known(KIND, GPU) is None
    monkeypatch.setattr(proof, "PROVEN", frozenset({("sm_90", here["triton"], "12.8")}))
    assert proof.against(*KIND, GPU) is None and not tried.held


def test_the_ways_reach_the_launch(monkeypatch):
    from memlm_kernels.launch import Kernel
    from memlm_kernels.routed_memory.kernels import spread

    class Function:
        fn, launched = spread.function.fn, []

        def __getitem__(self, grid):
            return lambda x, num_warps, num_stages: self.launched.append(
                (num_warps, num_stages, os.environ.get("DISABLE_MMA_V3"))
            )

    tiles = [{"num_warps": 8, "num_stages": 2}]
    kernel = Kernel(Function(), {"cuda": tiles, "hip": tiles})
    kernel._plain = Function()
    monkeypatch.setattr(proof, "ways", type(proof.ways)(lambda: proof.FIRST))
    for way in proof.WAYS:
        proof.ways[kernel.name] = way
        kernel(lambda tiles: 1, {}, x=torch.zeros(1))
    assert Function.launched == [(8, 2, None), (4, 1, None), (4, 1, "1")] and "DISABLE_MMA_V3" not in os.environ
    assert kernel.name == "memlm_kernels.routed_memory.kernels.spread"


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        (("sm_90", "3.6.0", "12.8"), ["Triton 3.4 to 3.7.0", "ptxas 12.8"]),
        (("sm_90", "3.7.0", "13.1"), ["Triton 3.4 to 3.7.0"]),
        (("sm_90", "3.9.0", "12.9"), ["ptxas 12.9"]),
        (("sm_90", "3.7.1", "13.1"), []),
        (("sm_80", "3.6.0", "12.8"), []),
        (("gfx942", "3.6.0", ""), []),
    ],
)
def test_compilers_known_to_be_wrong_are_named(machine, words):
    faults = proof.known_faults(*machine)
    assert len(faults) == len(words) and all(word in fault for word, fault in zip(words, faults, strict=True))


@pytest.mark.usefixtures("hopper", "as_on_a_gpu")
def test_plain_causal_attention_stays_with_torch(tried, caplog):
    """Its kernels are faster than those for windows; no trial is held for it."""
    q = torch.rand(1, 5, 2, 16, dtype=HALF)
    with caplog.at_level(logging.INFO, logger="memlm_kernels"):
        prefix_window_attention(q, q, q)
        prefix_window_attention(q, q, q, window=5)
        prefix_window_attention(q[:, -1:], q, q)
        assert not tried.held
        with set_backend("triton"):
            prefix_window_attention(q, q, q)
        tried.answers |= {way: {"fault": "a test"} for way in proof.WAYS}
        prefix_window_attention(q, q, q, window=3)
    assert {x for x, _ in tried.held} == {"prefix_window_attention, float16, 16x16"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
@pytest.mark.parametrize("memory", [name for name in MEMORIES if name != "omeganet"])
def test_a_model_on_the_kernels_is_one_graph(memory):
    """omeganet's memory has no kernels."""

    def stop(graph, inputs):
        raise Traced

    model, ids = build(memory, torch.float32).train(), torch.zeros(1, 24, dtype=torch.int64)
    with set_backend("triton"), pytest.raises(BackendCompilerFailed, match="Traced"):
        torch.compile(model, backend=stop, fullgraph=True)(ids, labels=ids)
    torch.compiler.reset()


def test_an_op_of_a_package_has_no_trial():
    said = proof.against("leaky_sum", torch.float32, (), torch.device("cuda", 0))
    assert said == "there is no trial of leaky_sum; ask for its kernels by backend='triton'"
