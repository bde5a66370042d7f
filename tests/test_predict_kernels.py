"""The report that predicts times from compiled kernels, on kernels made for it and on code written by hand."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytest.importorskip("triton", reason="Triton is not installed: pip install -e '.[cpu-kernels]'")

TTGIR = """\
#loc = loc("kernel.py":1:0)
#mma = #ttg.nvidia_mma<{versionMajor = 3, versionMinor = 0, warpsPerCTA = [8, 1], instrShape = [16, 64, 16]}>
module {
  tt.func public @kernel(%x: !tt.ptr<bf16> loc("x"(#loc)), %N: i32 loc("N"(#loc))) {
    %c0_i32 = arith.constant 0 : i32 loc(#loc)
    %c2_i32 = arith.constant 2 : i32 loc(#loc)
    %c16_i32 = arith.constant 16 : i32 loc(#loc)
    %program = tt.get_program_id x : i32 loc(#loc)
    %own = arith.remsi %program, %c2_i32 : i32 loc(#loc)
    %last = tt.load %x : !tt.ptr<i32> loc(#loc)
    %a = scf.for %n = %c0_i32 to %N step %c16_i32 iter_args(%s = %c0_i32) -> (i32)  : i32 {
      %end = arith.addi %n, %own : i32 loc(#loc)
      %b = scf.for %i = %n to %end step %c2_i32 iter_args(%r = %s) -> (i32)  : i32 {
        %d = ttng.warp_group_dot %p, %q, %s : !m<64x32xbf16, #s> * !m<32x64xbf16, #s> -> tensor<64x64xf32, #mma>
        scf.yield %r : i32 loc(#loc3)
      } loc(#loc3)
      scf.yield %b : i32 loc(#loc2)
    } loc(#loc4)
    %e = scf.while (%w = %c0_i32) : (i32) -> (i32) {
      scf.condition(%true) %w : i32 loc(#loc5)
    } do {
      scf.yield %w : i32 loc(#loc5)
    } loc(#loc5)
    tt.return loc(#loc)
  } loc(#loc)
} loc(#loc)
#loc2 = loc("kernel.py":10:5)
#loc3 = loc("kernel.py":12:9)
#loc4 = loc("a"(#loc2))
#loc5 = loc(callsite(#loc6 at #loc2))
#loc6 = loc("kernel.py":20:5)
"""
PTX = """\
	ld.global.b32 { %r1 }, [ %rd1 + 0 ];
	add.s32 	%r2, %r1, 1;
$L__BB0_1:
	.loc	1 10 5
	bar.sync 	0;
$L__BB0_2:
	.loc	1 12 9
	ld.global.b32 { %r3 }, [ %rd1 + 0 ];
	ld.global.b32 { %r4 }, [ %rd1 + 8 ];
	mov.b32 	%r5, %r3;
	@%p1 add.s32 	%r6, %r5, %r4;
	bar.sync 	0;
	ld.global.b32 { %r7 }, [ %rd1 + 16 ];
	wgmma.wait_group.sync.aligned 0;
	@%p1 bra 	$L__BB0_2;
	@%p2 bra 	$L__BB0_1;
"""


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


def test_loops_trip_counts_and_waits(scripts):
    from kernel_report import loops

    bounds = loops.bounds_of(TTGIR)
    assert [(x.line, x.parent) for x in bounds] == [(10, None), (12, 0), (20, None)]
    # Half of the programs run the inner loop once; the while loop's count is given.
    assert loops.trips(TTGIR, {"N": 50}, 1000, [7]) == [4, 0.5, 7]
    with pytest.raises(loops.Unknown, match="line 20"):
        loops.trips(TTGIR, {"N": 50}, 1000)
    assert loops.flops(TTGIR, [4, 0.5, 7]) == 2 * 64 * 64 * 32 * 2
    # %r7 is used in the next iteration at the earliest: nothing waits for it.
    outside, outer, inner = loops.loops_of(PTX, bounds)
    assert (outside.bounds, outer.bounds, inner.bounds, inner.parent) == (None, 0, 1, 1)
    assert (outside.rounds, outer.barriers, outer.rounds) == (1, 1, 0)
    assert (inner.barriers, inner.rounds, inner.waits, inner.instructions) == (1, 1, 1, 8)


def test_kernels_with_faults_fail():
    """Eight warps on 64 rows: two compute the same. A chunk loaded ahead makes nobody wait."""
    path = os.pathsep.join(str(ROOT / x) for x in ("scripts", "kernels"))
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": path}
    command = [sys.executable, str(ROOT / "tests" / "offender.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["eight warps"]["problems"] == ["2 warps compute the same"]
    assert found["four warps"]["problems"] == found["ahead"]["problems"] == []
    for name, rounds in {"eight warps": 1, "four warps": 1, "ahead": 0}.items():
        ((trips, barriers, of_loads, waits),) = found[name]["loops"]
        assert (trips, of_loads) == (40, rounds) and barriers >= 2 and waits == 2
    assert found["ahead"]["ms"] < found["four warps"]["ms"] < found["eight warps"]["ms"]


def test_programs_of_a_multiprocessor(scripts):
    import predict_kernels

    assert predict_kernels.apiece(255, 1000, 4) == 2
    assert predict_kernels.apiece(162, 1000, 8) == 1
    assert predict_kernels.apiece(32, 100_000, 4) == 2
    assert predict_kernels.redundancy(TTGIR) == 2
