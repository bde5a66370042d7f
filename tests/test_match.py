"""``match``: a model gets the size of another, without weights."""

import pytest
import torch

from memlm import MemLMConfig, MemLMForCausalLM
from memlm.flops import count_flops, count_parameters
from memlm.reader import Reader
from memlm.training import run
from tests.conftest import composed

SMALL = (
    "model.hidden_size=32",
    "data.seq_len=32",
    "data=mqar",
    "data.sources.mqar={kind: mqar, weight: 1, num_pairs: 4, gap: 4}",
)


def sizes(*overrides: str) -> tuple[int, int, float]:
    """Parameters and bytes of state of the real model, and FLOPs of a token."""
    cfg = composed("model=tiny", *SMALL, *overrides)
    assert "match" not in cfg
    config = MemLMConfig.from_hydra(cfg.model)
    reader = Reader(MemLMForCausalLM(config).eval())
    reader(torch.zeros(1, 32, dtype=torch.long))
    return count_parameters(reader.model), reader.nbytes(), count_flops(config, 32)


def near(size: float, wanted: float) -> bool:
    return abs(size / wanted - 1) <= 0.01


def test_the_control_has_the_parameters_of_the_memory_that_it_controls(capsys):
    wanted, _, _ = sizes()
    capsys.readouterr()
    found, _, _ = sizes("memory=none")
    assert near(found, wanted) and wanted > 1.2 * sizes("memory=none", "match.parameters=null")[0]
    line = f"match.parameters=default: model.intermediate_size=259 gives {found:,} parameters, {wanted:,} are wanted"
    assert capsys.readouterr().out.startswith(line)
    assert sizes("memory=none", "+model.intermediate_size=88") == sizes("memory=none", "match.parameters=null")
    # "default" is an experiment's own memory.
    own = count_parameters(MemLMForCausalLM(MemLMConfig.from_hydra(composed("experiment=facts").model)))
    control = composed("experiment=facts", "memory=none")
    assert near(count_parameters(MemLMForCausalLM(MemLMConfig.from_hydra(control.model))), own)


def test_state_and_parameters_are_matched_at_once():
    parameters, state, _ = sizes("memory=titans_lmm")
    mine = sizes(
        "memory=gla", "match.state=titans_lmm", "match.parameters=titans_lmm", "model.mixers.memory.num_heads=1"
    )
    assert near(mine[0], parameters) and near(mine[1], state)


def test_a_run_is_a_reference_and_flops_are_matched(tmp_path):
    run(
        composed(
            "model=tiny",
            *SMALL,
            "memory=titans_lmm",
            "train.steps=1",
            "train.batch_size=2",
            f"run_dir={tmp_path}/a-seed0",
        )
    )
    _, _, flops = sizes("memory=titans_lmm")
    assert near(sizes("memory=none", "match.parameters=null", f"match.flops={tmp_path}/a-seed0")[2], flops)


def test_tables_of_tokens_count_as_large_as_the_tokenizer_makes_them(tmp_path, capsys):
    small = MemLMConfig.from_hydra({**composed("model=tiny", "model.hidden_size=48").model, "vocab_size": 1000})
    small.save_pretrained(tmp_path)
    wanted = count_parameters(MemLMForCausalLM(small))
    tokens = ("data=text", "data.tokenizer={bpe: 1000}")
    cfg = composed("model=tiny", *tokens, "memory=none", "model.hidden_size=32", f"match.parameters={tmp_path}")
    found = count_parameters(MemLMForCausalLM(MemLMConfig.from_hydra({**cfg.model, "vocab_size": 1000})))
    assert near(found, wanted) and f"gives {found:,} parameters, {wanted:,} are wanted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["memory=linear_attention", "match.state=none", "match.tolerance=1e-9"],
            r"^match.state=none: model.mixers.memory.head_dim=\d+ gives .*; accept it by match.tolerance=0.0\d+",
        ),
        (
            ["memory=attention", "match.state=gla"],
            "^match.state=gla: attention has none of memory_head_dim, .* by hand",
        ),
        (
            ["match.parameters=mom", "match.flops=mom"],
            r"^match.parameters=mom and flops=mom both solve model.intermediate",
        ),
        (["match.parameters=titans_mug"], "^match.parameters=titans_mug: .*titans_mug"),
        (
            ["match.parameters=mom", "+model.intermediate_size=9"],
            "^match.parameters=mom solves model.intermediate_size; le",
        ),
        (
            ["memory=mom", "match.parameters=none"],
            r"^match.parameters=none: [\d,]+ are wanted, the model has [\d,]+ with",
        ),
        (["match.parameters=runs/no"], "^match.parameters=runs/no: there is no such folder"),
        (["match.tolerance=2"], "^match.tolerance=2.* must lie between 0 and 1"),
        (["match=3"], "^match=3 must be settings"),
    ],
)
def test_a_size_that_cannot_be_had_is_one_line(given, message):
    with pytest.raises(ValueError, match=message):
        composed("model=tiny", *SMALL, *given)
