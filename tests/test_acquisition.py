"""scripts/acquisition.py on curves made by hand."""

import importlib.util
import json
import math
import sys

import pytest

from memlm.data import Injection
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("acquisition", ROOT / "scripts" / "acquisition.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# After step 10 the score rises by 2, then falls to 1; after step 20 it rises by 3, and loses 1 in every tenfold time.
CURVE = {5: -9.0, 10: -8.0, 11: -7.0, 15: -6.0, 20: -7.0, 30: -4.0, 40: -4.4, 120: -5.2, 1020: -6.0}


def test_effectivity_is_the_peak_after_a_step_minus_the_score_before_it(script):
    assert script.effectivity(CURVE, [10, 20], 10) == pytest.approx((2 + 3) / 2)
    # A later peak is not looked for.
    assert script.effectivity(CURVE, [10], 1) == pytest.approx(1)


def test_what_is_kept_is_counted_from_the_first_step_and_the_last_peak(script):
    kept = script.kept(CURVE, [10, 20], 10)
    assert kept["gain"] == pytest.approx(4) and kept["retained"] == pytest.approx(2 / 4)
    # Shares of a gain of 4 that fall by 0.2 in every tenfold time since step 20.
    falling = {10: 0.0, **{20 + t: 4 - 0.8 * math.log10(t / 10) for t in (10, 20, 50, 100, 1000)}}
    assert script.kept(falling | {20: 0.0}, [10, 20], 10)["slope"] == pytest.approx(-0.2)
    lost = script.kept({10: 0.0, 11: -1.0, 20: -2.0}, [10], 10)
    assert lost["gain"] == -1 and math.isnan(lost["retained"]) and math.isnan(lost["slope"])


def lines(seed):
    """Scores of a run: facts of ``early`` gain by seed + 1, and all lose 0.5 at each step that is probed."""
    made, gained = [], {"early": 0.0, "late": 0.0, "never": 0.0}
    for step in (10, 11, 20, 30, 31, 40):
        drift = 0.5 * len(made)
        gained["early"] += (seed + 1) * (step == 11)
        gained["late"] += 4 * (step == 31)
        scores = {f"validation/{name}/{kind}/loss": 9 + drift - x * (kind == "verbatim")
                  for name, x in gained.items() for kind in ("verbatim", "swapped")}  # fmt: skip
        made.append({"step": step, **scores})
    return made


def test_gains_are_counted_from_facts_that_are_in_no_batch(script):
    settings = {"of": "text", "probe_every": 5, "probe_steps": 10}
    sources = {
        "early": Injection(start=10, times=1, **settings),
        "late": Injection(start=30, times=1, **settings),
        "never": Injection(times=0, **settings),
    }
    found = script.acquired(lines(0), sources)
    assert [*found] == ["early", "late", "late (not yet)"]
    for name, kind, gain in (("early", "verbatim", 1), ("early", "binding", 1), ("late", "binding", 4)):
        assert found[name][kind]["effectivity"] == found[name][kind]["gain"] == pytest.approx(gain)
    assert found["early"]["swapped"]["gain"] == pytest.approx(0)
    assert found["late (not yet)"]["verbatim"] == {"effectivity": pytest.approx(0)}


def test_seeds_of_runs_make_means_intervals_and_differences(script, tmp_path, monkeypatch, capsys):
    for memory, more in (("none", 0), ("titans_mag", 1)):
        for seed in range(3):
            run = tmp_path / f"{memory}-seed{seed}"
            run.mkdir()
            kinds = {name: f"{{kind: injected, weight: 1, of: text, {of}}}" for name, of in (
                ("early", "start: 10, times: 1, probe_steps: 10"), ("never", "times: 0"))}  # fmt: skip
            sources = ", ".join(f"{name}: {of}" for name, of in kinds.items())
            (run / "config.yaml").write_text(
                f"{{seed: {seed}, train: {{steps: 40}}, data: {{sources: {{{sources}}}}}}}"
            )
            (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines(seed + more)))
    out = tmp_path / "found.json"
    command = [f"{tmp_path}/*-seed*", "--against", f"{tmp_path}/none", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["acquisition.py", *command])
    script.main()
    found = {
        tuple(row[key] for key in ("run", "source", "kind", "measure")): row for row in json.loads(out.read_text())
    }
    assert found["none", "early", "binding", "gain"]["values"] == {"0": 1.0, "1": 2.0, "2": 3.0}
    assert found["titans_mag", "early", "binding", "gain"]["mean"] == pytest.approx(3)
    apart = found["titans_mag - none", "early", "binding", "gain"]
    assert (apart["mean"], apart["low"], apart["high"]) == pytest.approx((1, 1, 1))
    # Nothing of "swapped" was gained, so nothing can be retained.
    assert found["none", "early", "swapped", "retained"]["mean"] is None
    printed = capsys.readouterr().out
    assert "| titans_mag - none | early | 1.00 (1.00 to 1.00) | 0.00 (0.00 to 0.00) | 1.00 (1.00 to 1.00) |" in printed
    (tmp_path / "none-seed0" / "metrics.jsonl").write_text("")
    with pytest.raises(SystemExit, match="none-seed0: its 40 steps are not done; go on with it"):
        script.main()
