"""Measure a checkpoint, and its control beside it; write results.json, report.html, and a table on the screen."""

import json
import platform
import subprocess
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
import transformers
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

import memlm
from memlm.bank import MemoryBank
from memlm.data import (
    TEMPLATES,
    Chains,
    Facts,
    Library,
    Linked,
    Mixture,
    Passkey,
    QuestionSource,
    RecallSource,
    Source,
    TextSource,
    build_data,
    token_bytes,
)
from memlm.evaluation import plots
from memlm.evaluation.ablation import memory_off
from memlm.evaluation.measures import bank, interleaved, needles, plain, recall, text_by_position
from memlm.evaluation.report import Report
from memlm.hub import load_model, load_tokenizer
from memlm.interleave import Interleave
from memlm.memory.base import check_type
from memlm.modeling import MemLMForCausalLM, count_parameters
from memlm.training import checkpoint
from memlm.training.tracking import read_metrics
from memlm_kernels import set_backend


@dataclass
class Subject:
    """A model under evaluation and where it comes from; memory_off: measured without its long-term memory."""

    name: str
    folder: Path | str
    run_dir: Path | None
    model: MemLMForCausalLM
    tokenizer: PreTrainedTokenizerBase
    memory_off: bool = False


def run(cfg: DictConfig) -> None:
    """Evaluate ``cfg.checkpoint``, a run directory, a checkpoint folder or a hub name.

    With ``cfg.memory_off`` its long-term memory is silent, and the results stand beside the others.
    Raises ValueError, one line, for what the user can mend; earlier results stay until new ones are whole.
    """
    with set_backend(cfg.hardware.kernels, "hardware.kernels"):
        _run(cfg)


def _run(cfg: DictConfig) -> None:
    started = time.perf_counter()
    check_type(cfg.memory_off, bool, "memory_off")
    device = _device(cfg.hardware.device)
    console = Console(highlight=False, soft_wrap=True)
    subjects = [_load(str(cfg.checkpoint), device)]
    if cfg.memory_off:
        subjects[0] = replace(subjects[0], name=f"{subjects[0].name} (memory off)", memory_off=True)
    if cfg.control and Path(cfg.control) != subjects[0].run_dir:
        if checkpoint.latest(Path(cfg.control)):
            control = _load(str(cfg.control), device)
            subjects.append(replace(control, name=f"control ({control.name})"))
        else:
            console.print(f"no control at {cfg.control}; 'python train.py memory=none' trains it", markup=False)
    data = _data_config(cfg, subjects[0])
    tokenizer, mixture = build_data(data, seed=cfg.seed, batch_size=max(1, 2 * len(data["sources"])))
    results: dict[str, Any] = {"environment": _environment(device), "data": data, "models": {}}
    results["corpora"] = {n: s.corpus.folder.name for n, s in mixture.sources.items() if isinstance(s, TextSource)}
    if cfg.eval.bank_documents:
        least = min(*cfg.eval.bank_documents, cfg.eval.bank_questions)
        if least < 1:
            raise ValueError(f"eval.bank_documents and eval.bank_questions hold {least}; use 1 or more")
        subjects = _with_banks(subjects, mixture, console)
    for subject in subjects:
        if len(tokenizer) > subject.model.config.vocab_size:
            raise ValueError(
                f"data.tokenizer has {len(tokenizer)} entries, {subject.folder} embeds "
                f"{subject.model.config.vocab_size}; evaluate with the data it was trained on"
            )
        console.print(f"evaluating {subject.name}: {subject.folder}", markup=False)
        with memory_off(subject.model) if subject.memory_off else nullcontext():
            results["models"][subject.name] = _measure(
                cfg.eval, subject, mixture, torch.from_numpy(token_bytes(tokenizer))
            )
    results["seconds"] = round(time.perf_counter() - started, 1)

    folder = "evaluation-memory_off" if cfg.memory_off else "evaluation"
    out = Path(cfg.out) if cfg.out else (subjects[0].run_dir or Path("runs") / "evaluation") / folder
    out.mkdir(parents=True, exist_ok=True)
    partial = out / "results.tmp"
    partial.write_text(json.dumps(results, indent=1))
    partial.replace(out / "results.json")
    page = _report(subjects, results, data["seq_len"]).write(out)
    for header, rows in _tables(results).values():
        table = Table(*header)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print(f"{results['seconds']:.0f} s; {page}", markup=False)


def _measure(options: DictConfig, subject: Subject, mixture: Mixture, sizes: torch.Tensor) -> dict[str, Any]:
    model = subject.model
    measured: dict[str, Any] = {
        "checkpoint": str(subject.folder),
        "parameters": count_parameters(model),
        "kinds": sorted({m["kind"] for m in model.config.mixers.values()}),
        "recall": [],
        "needles": [],
        "bank": [],
        "interleaved": [],
        "text": {},
    }
    for name, source in mixture.sources.items():
        for documents in options.bank_documents:
            if (library := _library(source, documents, options.bank_questions)) is not None:
                measured["bank"] += plain([bank(model, name, library)])
            if (read := _read_on(source, documents, options.bank_questions)) is not None:
                asked = interleaved(model, subject.tokenizer, name, *read, options.bank_questions)
                measured["interleaved"] += plain([asked])
        if isinstance(source, RecallSource):
            task = source.task
            measured["recall"] += plain(recall(model, name, task, source.seed, options.factors, options.recall_rows))
            if isinstance(task, Passkey):
                lengths = [task.length * f for f in options.factors]
                cells = needles(model, task, source.seed, lengths, options.depths, options.needle_rows)
                measured["needles"] = plain(cells)
        elif isinstance(source, TextSource) and options.text_documents:
            documents = [tokens for _, tokens in islice(source.corpus.documents("test"), options.text_documents)]
            for carried in (True, False):
                measured["text"]["carried" if carried else "reset"] = asdict(
                    text_by_position(model, documents, sizes, source.seq_len, carried, options.text_length)
                )
    return measured


def _library(source: Source, documents: int, questions: int) -> Library | None:
    """Test documents of a source that has such, and questions about them."""
    if isinstance(source, RecallSource) and isinstance(source.task, Facts):
        return source.task.library(source.seed, "test", documents, questions)
    return source.library("test", documents, questions) if isinstance(source, QuestionSource) else None


def _read_on(source: Source, documents: int, questions: int) -> tuple[Interleave, Iterable[Linked]] | None:
    """How questions of a source are answered by reading on, and test documents with such, where it has any."""
    if isinstance(source, RecallSource) and isinstance(task := source.task, Chains):
        way = Interleave(**TEMPLATES, max_rounds=task.hops, max_new_tokens=task.length)
        return way, (task.linked(source.seed, "test", index, documents) for index in count())
    if isinstance(source, QuestionSource) and source.templates.named:
        linked = source.linked("test", documents, questions)
        answered = linked._replace(chains=[chain for chain in linked.chains if chain.answer])
        way = Interleave(**asdict(source.templates), max_rounds=1, max_new_tokens=min(source.seq_len, 2048))
        return (way, [answered]) if answered.chains else None
    return None


def _with_banks(subjects: list[Subject], mixture: Mixture, console: Console) -> list[Subject]:
    """Of the subjects those that can keep documents; raises ValueError if the first cannot, or there are none."""
    tasks = [source.task if isinstance(source, RecallSource) else source for source in mixture.sources.values()]
    if not any(isinstance(task, Facts | Chains | QuestionSource) for task in tasks):
        raise ValueError("eval.bank_documents: the data has no documents; use data=facts, or a source of questions")
    able = []
    for subject in subjects:
        try:
            MemoryBank(subject.model)
            able.append(subject)
        except ValueError as error:
            if subject is subjects[0]:
                raise ValueError(f"{subject.folder} has no bank: {error}") from None
            console.print(f"{subject.name} has no bank: {error}", markup=False)
    return able


def _load(source: str, device: torch.device) -> Subject:
    path = Path(source)
    run_dir, folder = None, source
    if checkpoint.latest(path):
        run_dir, folder = path, checkpoint.latest(path)
    elif path.is_dir() and path.parent.name == "checkpoints":
        run_dir = path.parent.parent
    elif not path.exists() and (source.startswith(("runs", ".", "/")) or source.count("/") > 1):
        raise ValueError(
            f"checkpoint={source}: there is no run; train it first, or name a run, a folder or a hub name"
        )
    model = load_model(folder).to(device).eval()
    name = run_dir.name.split("-seed")[0] if run_dir else path.name
    return Subject(name, folder, run_dir, model, load_tokenizer(folder))


def _data_config(cfg: DictConfig, subject: Subject) -> dict[str, Any]:
    if cfg.get("data"):
        return OmegaConf.to_container(cfg.data, resolve=True)
    config = subject.run_dir / "config.yaml" if subject.run_dir else None
    if config is None or not config.exists():
        raise ValueError(f"{subject.folder}: no config.yaml of a run beside it says what data it knows; add data=...")
    return OmegaConf.to_container(OmegaConf.load(config), resolve=True)["data"]


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("hardware.device='cuda' but torch sees no GPU; use hardware.device=auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _environment(device: torch.device) -> dict[str, str]:
    try:
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    processor = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return {
        "memlm": memlm.__version__,
        "commit": commit,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": processor,
    }


def _tables(results: dict[str, Any]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Header and rows of each table by what it tells, for the screen and the page alike."""
    tables = {}
    models = results["models"]
    first = next(iter(models.values()))
    if first["recall"]:
        factors = dict.fromkeys(r["factor"] for r in first["recall"])
        header = ["tokens (rows) recalled", *(f"{f}x length" for f in factors)]
        rows = []
        for name, measured in models.items():
            for task in dict.fromkeys(r["task"] for r in measured["recall"]):
                mine = [r for r in measured["recall"] if r["task"] == task]
                cells = [f"{r['accuracy']:.3f} ({r['row_accuracy']:.2f})" for r in mine]
                rows.append([f"{name}, {task}", *cells])
        for task, chance in {r["task"]: r["chance"] for r in first["recall"]}.items():
            rows.append([f"chance, {task}", *[f"{chance:.3f}"] * (len(header) - 1)])
        tables["recall"] = header, rows
    if first["bank"]:
        header = [
            "a bank's documents",
            "layer, k",
            "hit@1, hit@k",
            "recall@k, precision",
            "answers, chance",
            "deleted",
        ]
        rows = []
        for name, measured in models.items():
            for b in measured["bank"]:
                rows += [
                    [
                        f"{name}, {b['documents']:,} of {b['source']}",
                        f"{layer['layer']}, {layer['top_k']}",
                        f"{layer['hit_1']:.3f}, {layer['hit']:.3f}",
                        f"{layer['recall']:.3f}, {layer['precision']:.3f}",
                        f"{b['exact']:.3f}, {b['chance']:.3f}",
                        f"{b['exact_deleted']:.3f}",
                    ]
                    for layer in b["layers"]
                ]
        tables["bank"] = header, rows
    if first["interleaved"]:
        hops = range(max(len(i["hops"]) for i in first["interleaved"]))
        header = ["read on in a bank's documents", *(f"hop {hop + 1}" for hop in hops), "answers", "chance", "deleted"]
        rows = []
        for name, measured in models.items():
            for i in measured["interleaved"]:
                cells = [f"{share:.3f}" for share in i["hops"]] + [""] * (len(hops) - len(i["hops"]))
                cells += [f"{i[key]:.3f}" for key in ("exact", "chance", "exact_deleted")]
                rows.append([f"{name}, {i['documents']:,} of {i['source']}", *cells])
        tables["interleaved"] = header, rows
    if first["text"]:
        rows = [
            [
                name,
                f"{m['text']['carried']['bits_per_byte']:.4f}",
                f"{m['text']['reset']['bits_per_byte']:.4f}",
            ]
            for name, m in models.items()
        ]
        tables["text"] = ["bits per byte of text", "memory carried", "reset each segment"], rows
    return tables


def _report(subjects: list[Subject], results: dict[str, Any], training_length: int) -> Report:
    models = results["models"]
    report = Report(f"memlm: {', '.join(models)}")
    environment = ", ".join(f"{key} {value}" for key, value in results["environment"].items())
    report.note(f"{environment}; {results['seconds']} s.")
    report.table(
        ["model", "kind", "parameters", "checkpoint"],
        [[n, ", ".join(m["kinds"]), f"{m['parameters']:,}", m["checkpoint"]] for n, m in models.items()],
    )
    tables = _tables(results)
    if any(m["needles"] for m in models.values()):
        report.heading("Needle in a haystack")
        grids = {name: m["needles"] for name, m in models.items() if m["needles"]}
        report.picture("needles", plots.needle_map(grids, training_length), "needle accuracy")
        cell = next(iter(grids.values()))[0]
        report.note(
            "A key and four symbols stand once in noise; the end asks for them. A cell is the share of the four "
            f"recalled, teacher forced, over {cell['rows']} texts never trained on; chance is {cell['chance']:.3f}. "
            "Right of the dashed line the texts are longer than any in training."
        )
    if models[subjects[0].name]["recall"]:
        report.heading("Recall at the trained length and beyond")
        report.table(*tables["recall"])
        recalls = {name: m["recall"] for name, m in models.items()}
        report.picture("recall", plots.accuracy_by_length(recalls), "recall accuracy by length")
        rows = models[subjects[0].name]["recall"][0]["rows"]
        report.note(f"{rows} test rows a point; by row: every answer of the row right.")
    if "bank" in tables:
        report.heading("A bank of documents that training never saw")
        report.table(*tables["bank"])
        banks = {name: m["bank"] for name, m in models.items() if m["bank"]}
        report.picture("bank", plots.by_documents(banks), "hits and answers by documents of a bank")
        report.note(
            f"{next(iter(banks.values()))[0]['questions']} questions, each about one document or a few. hit@1: the "
            "best document is one of these; hit@k: one of those read is; recall@k: the share of these that is read; "
            "precision: the share of what is read that is one of these; answers: every token right; deleted: the same "
            "with every document asked about deleted from the bank."
        )
    if "interleaved" in tables:
        report.heading("Questions answered by reading on")
        report.table(*tables["interleaved"])
        questions = models[subjects[0].name]["interleaved"][0]["questions"]
        report.note(
            f"{questions} questions, to as many banks as these take. hop: read right so far, one document a round, "
            "each named by the model; answers: exact, as written; deleted: the same without the document that holds "
            "the answer."
        )
    texts = {f"{n}, {how}": t for n, m in models.items() for how, t in m["text"].items()}
    if texts:
        first = next(iter(texts.values()))
        report.heading("Held-out text by position")
        report.table(*tables["text"])
        bits = {f"{name}: {t['bits_per_byte']:.3f}": t["by_position"] for name, t in texts.items()}
        picture = plots.by_position(bits, first["edges"], "bits per byte", "over all positions")
        report.picture("text", picture, "bits per byte by position")
        report.note(
            f"{first['documents']} documents, {first['tokens']:,} tokens, read in segments of {first['segment']}; "
            "carried: one memory for a document; reset: a new one each segment. Same tokens scored either way."
        )
        surprises = {
            f"{n}, {name.removesuffix('/surprise')}": values
            for n, m in models.items()
            for name, values in m["text"]["carried"]["of_tokens"].items()
            if name.endswith("/surprise")
        }
        if surprises:
            picture = plots.by_position(surprises, first["edges"], "surprise")
            report.picture("surprise", picture, "surprise by position")
            report.note(
                "Surprise: the norm of the gradient of the inner loss, a mean over tokens and heads; memory carried."
            )
    # What trained did so with its memory on.
    trained = [s for s in subjects if s.run_dir and not s.memory_off]
    runs = {s.name: read_metrics(s.run_dir / "metrics.jsonl") for s in trained}
    if any(runs.values()):
        report.heading("Training")
        report.picture("loss", plots.curves(runs, "loss/", "nats, training", logarithmic=True), "training loss")
        report.picture("validation", plots.curves(runs, "validation/", "validation"), "validation")
        report.picture("gates", plots.curves(runs, "layer", "memory"), "gates and memory over training")
    return report
