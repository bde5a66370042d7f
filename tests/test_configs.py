"""Every YAML composes and builds its model."""

import math
import re
import shutil

import pytest
import torch
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf

from memlm import MemLMConfig, MemLMForCausalLM, cli
from memlm.cli import one_line, open_settings, use_gpu_preset
from memlm.data import MQAR, Passkey, byte_tokenizer
from memlm.evaluation.measures import measures
from memlm.evaluation.tasks import Setting
from memlm.flops import count_active_parameters, count_flops, count_parameters
from memlm.training.budget import in_steps
from memlm.training.model import BackboneSettings, model_config
from memlm.training.settings import RunSettings
from tests.conftest import MEMORIES, ROOT, composed

GROUPS = sorted(
    (path.parent.name, path.stem) for path in (ROOT / "configs").glob("*/*.yaml") if path.parent.name != "eval"
)


@pytest.mark.parametrize(("group", "choice"), GROUPS)
def test_every_choice_composes_and_its_model_builds(group, choice):
    cfg = composed(f"{group}={choice}")
    settings = OmegaConf.to_container(cfg.model, resolve=True)
    if "backbone" in settings:
        memory = BackboneSettings.of(settings | {"backbone": "my/llama"}).memory
        kinds = {"backbone": "titans_mag", "retrofit": "gated_delta_net"}
        assert (memory["kind"] if memory else None) == kinds.get(choice)
        return
    with torch.device("meta"):
        model = MemLMForCausalLM(MemLMConfig.from_hydra(settings))
    assert sum(p.numel() for p in model.parameters()) > 0


@pytest.mark.parametrize("choice", sorted(path.stem for path in (ROOT / "configs" / "eval").glob("*.yaml")))
def test_every_evaluation_composes_and_its_tasks_take_their_settings(choice):
    named = ["eval.tasks=[lambada_openai]"] if choice == "lm_eval" else []
    chosen = measures(OmegaConf.to_container(composed(f"eval={choice}", *named, config="evaluate").eval, resolve=True))
    (asked,) = (measure for measure in chosen if measure.name == "asked")
    setting = Setting(byte_tokenizer(), 0)
    for task in asked.tasks:
        task.check(setting)


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        (["eval=state", "eval.ask={mqar: {}}"], {"mqar": {}}),
        (["eval=recall", "eval.ask= {mqar: {gap: 0.5}}"], {"mqar": {"gap": 0.5}}),
        (["eval=recall", "eval.ask.mqar={gap: 0.5}", "eval.ask.mqar.rows=2"], {"mqar": {"gap": 0.5, "rows": 2}}),
        (["eval=recall", "eval.ask.mqar.num_pairs=4"], {"mqar": {"num_pairs": 4, "forms": ["own", "zoology"]}}),
        (["eval=recall", "+eval.ask.order={}"], {"order": {}, "mqar": {"num_pairs": 8, "forms": ["own", "zoology"]}}),
        (["eval.ask.mqar={}"], {"mqar": {}}),
    ],
)
def test_tasks_that_a_command_names_replace_those_of_the_choice(arguments, asked):
    found = OmegaConf.to_container(composed(*open_settings(arguments), config="evaluate").eval.ask)
    alone = any("eval.ask=" in argument for argument in arguments)
    assert found == asked if alone else asked.items() <= found.items()


def test_the_default_model_is_small():
    model = MemLMForCausalLM(MemLMConfig.from_hydra(OmegaConf.to_container(composed().model, resolve=True)))
    assert sum(p.numel() for p in model.parameters()) <= 2_000_000


def test_no_yaml_sets_hydras_mode():
    """The tests' processes do not ask for it: see ``get_mode`` in conftest.py."""
    for path in (ROOT / "configs").rglob("*.yaml"):
        assert "mode" not in OmegaConf.load(path).get("hydra", {}), path


def test_overrides_reach_the_memory():
    cfg = composed("memory=titans_mag_deep", "model.mixers.memory.chunk_size=8")
    config = MemLMConfig.from_hydra(OmegaConf.to_container(cfg.model, resolve=True))
    assert config.mixers["memory"]["chunk_size"] == 8 and config.mixers["memory"]["memory_depth"] == 2


@pytest.mark.parametrize(
    ("first_line", "message"),
    [
        ("", r"memory=\{'kind': 'gla', 'head_dim': 8\} is read by nothing"),
        ("# @package _global_", "kind='gla' is not a setting"),
        ("# @package model.mixers", "model.mixers.kind='gla' must be the settings of a mixer"),
        ("# @package model.mixers.memry", "model.mixers.memory.kind is missing"),
        ("of_model", r"memory=\{'of_model': \{'kind': 'gla', 'head_dim': 8\}\} is read by nothing"),
    ],
)
def test_a_memory_whose_yaml_lands_elsewhere_is_told_so(tmp_path, first_line, message):
    """Without this error, the settings of a file that only adds settings would be silently left out."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    name, override = ("of_model/mine", "memory/of_model=mine") if first_line == "of_model" else ("mine", "memory=mine")
    line = first_line if first_line.startswith("#") else ""
    (tmp_path / "configs" / "memory" / f"{name}.yaml").write_text(f"{line}\nkind: gla\nhead_dim: 8\n")
    cfg = cli.composed(tmp_path / "configs", "train", [override, "run_dir=somewhere"])
    with pytest.raises(
        ValueError, match=f"{message}.*; a YAML of configs/memory begins with '# @package model.mixers"
    ):
        MemLMConfig.from_hydra(RunSettings.of(cfg).config["model"])


@pytest.mark.parametrize("run", ["model=tiny", "experiment=recall", "experiment=recall_hard", "experiment=gpu"])
def test_the_control_cannot_know_the_answers(run):
    """gap > layers * (window - 1 + conv - 1), checked by perturbation too."""
    cfg = composed("memory=none", run)
    settings = OmegaConf.to_container(cfg.model, resolve=True)
    settings["hidden_size"], settings["num_attention_heads"] = 32, 2
    for name in ("head_dim", "num_key_value_heads", "intermediate_size"):
        settings.pop(name, None)
    torch.manual_seed(0)
    model = MemLMForCausalLM(MemLMConfig.from_hydra(settings)).double().eval()
    memory = settings["mixers"]["memory"]
    reach = settings["num_hidden_layers"] * (memory["window_size"] - 1 + memory["conv_size"] - 1)
    length = reach + 30
    ids = torch.randint(256, (1, length))
    edited = ids.clone()
    edited[:, 0] += 1
    with torch.no_grad():
        change = (model(ids).logits - model(edited).logits).abs().sum(-1)[0]
    assert change[: reach + 1].min() > 0 and change[reach + 1 :].max() == 0
    sources = cfg.data.sources
    for source in sources.values():
        if source.kind == "mqar":
            assert MQAR(cfg.data.seq_len, source.num_pairs, source.gap).min_distance > reach
        elif source.kind == "passkey":
            assert Passkey(cfg.data.seq_len, source.digits, source.gap).min_distance > reach


def counted(*overrides):
    """The configuration, and its parameters in millions."""
    config = MemLMConfig.from_hydra(OmegaConf.to_container(composed(*overrides).model, resolve=True))
    with torch.device("meta"):
        return config, count_parameters(MemLMForCausalLM(config)) / 1e6


def sizes(cfg):
    """Tokens of a step, and steps."""
    train = in_steps(cfg.train, cfg.data)
    return train["batch_size"] * cfg.data.seq_len, train["steps"]


# Titans' sizes are those of the names; MoM's are those of the release, whose README has 380M and 1.3B.
PAPERS = {f"titans_{n}m": n for n in (170, 340, 400, 760)} | {"mom_340m": 512, "mom_1.3b": 1553, "qwen3_4b": 4022}


@pytest.mark.parametrize(("model", "millions"), PAPERS.items())
def test_a_papers_model_alone_is_the_papers(model, millions):
    """It has the paper's size, and a memory with the paper's heads and start, as in the experiment that trains it."""
    config, parameters = counted(f"model={model}")
    assert parameters == pytest.approx(millions, rel=0.03)
    memory = config.mixers["memory"]
    assert memory.get("initialization", "default") == "default"
    heads = {name: value for name, value in memory.items() if name in ("memory_heads", "num_heads")}
    assert all(value == config.num_attention_heads for value in heads.values()) and len(heads) == (
        memory["kind"] != "attention"
    )
    if model.startswith("titans"):
        assert memory["memory_heads"] * memory["memory_head_dim"] == config.hidden_size
        # Two FLOPs per weight, and more for the memory's weights, which are also written.
        assert 2 < count_flops(config, 128) / parameters / 1e6 < 3
    if (experiment := model.split("_")[0]) != "qwen3":
        trained, _ = counted(f"experiment={experiment}_paper", f"model={model}")
        assert (trained.mixers, trained.mixer_pattern) == (config.mixers, config.mixer_pattern)


def test_every_paper_has_a_test_of_its_size():
    assert {path.stem for path in (ROOT / "configs" / "model").glob("*.yaml")} == {
        *PAPERS,
        "tiny",
        "small",
        "backbone",
    }


@pytest.mark.parametrize("stage", ["msa_warmup", "msa_main", "msa_8k", "msa_64k"])
def test_the_stages_of_msa_train_one_model(stage):
    config, parameters = counted(f"experiment={stage}")
    assert parameters == pytest.approx(4258, rel=0.001) and config.layer_mixers().count("memory") == 18
    assert all(mixer["kind"] == "msa" and mixer["qk_norm"] for mixer in config.mixers.values())


def test_a_memory_that_a_papers_model_has_no_settings_for_is_refused():
    """The YAML's own settings are for a tiny model; they are taken only on request."""
    with pytest.raises(MissingConfigException) as caught:
        composed("model=titans_340m", "memory=chunk_sparse")
    line = one_line(caught.value, ROOT / "configs", "train")
    assert line.startswith("memory=chunk_sparse: model=titans_* has no settings for it; one of: attention, ")
    assert line.endswith("or add memory/of_model=none to take memory=chunk_sparse as it is")
    config, _ = counted("model=titans_340m", "memory=chunk_sparse", "memory/of_model=none")
    assert config.mixers["memory"]["chunk_size"] == 4


def test_every_memory_can_have_the_size_that_a_name_says():
    """With the MLP width that the experiment gives for each memory."""
    text = (ROOT / "configs" / "experiment" / "titans_paper.yaml").read_text()
    rows = re.findall(r"^#   (\w+) +(\d+) +(\d+) +(\d+) +(\d+)$", text, re.MULTILINE)
    assert len(rows) == 7
    for i, (memory, *widths) in enumerate(rows):
        millions = (170, 340, 400, 760)[i % 4]
        chosen = ["experiment=titans_paper", f"model=titans_{millions}m", f"memory={memory}"]
        cfg = composed(*chosen, f"model.intermediate_size={widths[i % 4]}")
        with torch.device("meta"):
            model = MemLMForCausalLM(MemLMConfig.from_hydra(OmegaConf.to_container(cfg.model, resolve=True)))
        assert count_parameters(model) == pytest.approx(millions * 1e6, rel=0.01), memory


@pytest.mark.parametrize("memory", [m for m in MEMORIES if m.startswith("titans_") or m in ("omeganet", "lact")])
def test_titans_paper_has_settings_of_its_own_for_each_of_its_kind(memory):
    """No memory takes the settings of the tiny default run."""
    cfg = composed("experiment=titans_paper", f"memory={memory}")
    config = MemLMConfig.from_hydra(OmegaConf.to_container(cfg.model, resolve=True))
    settings = config.mixers["memory"]
    if memory == "lact":
        assert settings["chunk_size"] == 2048
    else:
        assert settings["memory_heads"] * settings["memory_head_dim"] == config.hidden_size
        assert settings["initialization"] == "default" and settings["memory_depth"] == 2


@pytest.mark.parametrize(("size", "total", "active"), [("340m", 512, 411), ("1.3b", 1553, 1351)])
def test_mom_sizes_are_the_released_ones(size, total, active):
    counted = {}
    for memory in ("mom", "gated_delta_net"):
        cfg = composed("experiment=mom_paper", f"model=mom_{size}", f"memory={memory}")
        config = MemLMConfig.from_hydra(OmegaConf.to_container(cfg.model, resolve=True))
        with torch.device("meta"):
            model = MemLMForCausalLM(config)
        counted[memory] = [round(count(model) / 1e6) for count in (count_parameters, count_active_parameters)]
        assert 2 < count_flops(config, 128) / count_active_parameters(model) < 3
    assert counted["mom"] == [total, active]
    assert counted["gated_delta_net"][0] == counted["gated_delta_net"][1] < active
    assert sizes(cfg) == (2**19, 30720)


def test_titans_paper_is_the_paper_and_has_a_control():
    paper, control = (composed("experiment=titans_paper", f"memory={memory}") for memory in ("titans_mag", "none"))
    assert sizes(paper) == (2**19, math.ceil(15e9 / 2**19))
    for name in ("window_size", "persistent_tokens"):
        assert control.model.mixers.memory[name] == paper.model.mixers.memory[name] > 4
    chosen = composed("experiment=titans_paper", "model.mixers.memory.window_size=77")
    assert chosen.model.mixers.memory.window_size == 77


def test_settings_of_a_memory_in_a_papers_model_are_of_one_that_exists():
    """A misspelt name would have no effect."""
    of_models = [*(ROOT / "configs" / "memory" / "of_model").glob("*/*.yaml")]
    assert of_models and all(path.stem in MEMORIES for path in of_models)


@pytest.mark.parametrize("experiment", [choice for group, choice in GROUPS if group == "experiment"])
def test_settings_of_one_memory_in_an_experiment_are_settings_of_that_memory(experiment):
    settings_of = OmegaConf.load(ROOT / "configs" / "experiment" / f"{experiment}.yaml").get("of_memory", {})
    for memory, settings in settings_of.items():
        config, _ = counted(f"experiment={experiment}", f"memory={memory}")
        assert {**config.mixers["memory"], **settings} == config.mixers["memory"], memory


def test_settings_of_one_memory_stand_between_its_yaml_and_the_command_line():
    for given, head_dim in (
        ((), 4),
        (["++model.mixers.memory.head_dim=12"], 12),
        (["++model.mixers.memory={head_dim: 12}"], 12),
        (["of_memory.mom.head_dim=12"], 12),
        (["~model.mixers.memory.head_dim"], None),
        (["memory=gla"], composed("memory=gla").model.mixers.memory.head_dim),
    ):
        cfg = composed("experiment=mqar_short", "memory=mom", *given)
        assert cfg.model.mixers.memory.get("head_dim") == head_dim and "of_memory" not in cfg, given
    with pytest.raises(ValueError, match=r"of_memory\.moms: no such memory; did you mean 'mom'"):
        composed("experiment=mqar", "+of_memory.moms.head_dim=8")


def test_memories_are_all_listed_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    assert all(f"memory={name}" in readme for name in MEMORIES)


def test_gpu_preset_only_where_nothing_was_chosen(monkeypatch):
    preset = ("experiment=gpu", ("experiment=", "model="))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert use_gpu_preset(["memory=none"], *preset) == ["memory=none", "experiment=gpu"]
    assert use_gpu_preset(["experiment=recall"], *preset) == ["experiment=recall"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert use_gpu_preset([], *preset) == []


def test_vocabulary_must_fit_the_tokenizer():
    class Tokenizer:
        pad_token_id = bos_token_id = eos_token_id = None

        def __len__(self):
            return 300

    with pytest.raises(ValueError, match=r"model\.vocab_size=259 is less than the tokenizer's 300"):
        model_config({"vocab_size": 259}, Tokenizer())
    assert model_config({}, Tokenizer()).vocab_size == 300
