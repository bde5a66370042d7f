"""What an evaluation shows: tables, for the screen and the page alike, and the page itself."""

from typing import Any

from memlm.evaluation import plots
from memlm.evaluation.report import Report
from memlm.evaluation.subject import Subject, differences
from memlm.training.tracking import read_metrics


def tables(results: dict[str, Any]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Header and rows of each table by what it tells, for the screen and the page alike."""
    models = results["models"]
    first = next(iter(models.values()))
    header = ["model", "parameters", "tokens are", "step", "tokens seen"]
    found = {"models": (header, [_trained(name, model) for name, model in models.items()])}
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
        found["recall"] = header, rows
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
        found["bank"] = header, rows
    if first["interleaved"]:
        hops = range(max(len(i["hops"]) for i in first["interleaved"]))
        header = ["read on in a bank's documents", *(f"hop {hop + 1}" for hop in hops), "answers", "chance", "deleted"]
        rows = []
        for name, measured in models.items():
            for i in measured["interleaved"]:
                cells = [f"{share:.3f}" for share in i["hops"]] + [""] * (len(hops) - len(i["hops"]))
                cells += [f"{i[key]:.3f}" for key in ("exact", "chance", "exact_deleted")]
                rows.append([f"{name}, {i['documents']:,} of {i['source']}", *cells])
        found["interleaved"] = header, rows
    if first["text"]:
        rows = [
            [name, *(f"{read[how]['bits_per_byte']:.4f}" for how in ("carried", "reset"))]
            for name, read in _by_source(models, "text").items()
        ]
        found["text"] = ["bits per byte of text", "memory carried", "reset each segment"], rows
    return found


def _trained(name: str, model: dict[str, Any]) -> list[str]:
    step, seen = ("unknown" if model[key] is None else f"{model[key]:,}" for key in ("step", "tokens_seen"))
    if model["step"] is not None and model["steps"] is not None:
        step += f" of {model['steps']:,}"
    if model["begun_from"]:
        seen += f" after {model['begun_from']}"
    return [name, f"{model['parameters']:,}", model["tokenizer"], step, seen]


def _by_source(models: dict[str, Any], kind: str) -> dict[str, Any]:
    """What was measured of each model and source; the source is named where there are several."""
    return {
        f"{name}, {source}" if len(model[kind]) > 1 else name: measured
        for name, model in models.items()
        for source, measured in model[kind].items()
    }


def page(subjects: list[Subject], results: dict[str, Any]) -> Report:
    models = results["models"]
    report = Report(f"memlm: {', '.join(models)}")
    environment = ", ".join(f"{key} {value}" for key, value in results["environment"].items())
    report.note(f"{environment}; {results['seconds']} s.")
    shown = tables(results)
    header, rows = shown["models"]
    more = ([", ".join(m["kinds"]), m["dtype"], m["checkpoint"]] for m in models.values())
    report.table(
        [*header, "kind", "dtype", "checkpoint"], [[*row, *rest] for row, rest in zip(rows, more, strict=True)]
    )
    for note in results["notes"]:
        report.note(note)
    others = differences([m["settings"] for m in models.values()])
    if others:
        report.heading("Settings that differ")
        report.table(["", *models], [[key, *map(str, values)] for key, values in others.items()])
    if any(m["needles"] for m in models.values()):
        report.heading("Needle in a haystack")
        grids = _by_source(models, "needles")
        report.picture("needles", plots.needle_map(grids, subjects[0].trained_length), "needle accuracy")
        cell = next(iter(grids.values()))[0]
        report.note(
            "A key and four symbols stand once in noise; the end asks for them. A cell is the share of the four "
            f"recalled, teacher forced, over {cell['rows']} texts never trained on; chance is {cell['chance']:.3f}. "
            "Right of the dashed line the texts are longer than any in training."
        )
    if models[subjects[0].name]["recall"]:
        report.heading("Recall at the trained length and beyond")
        report.table(*shown["recall"])
        recalls = {name: m["recall"] for name, m in models.items()}
        report.picture("recall", plots.accuracy_by_length(recalls), "recall accuracy by length")
        rows = models[subjects[0].name]["recall"][0]["rows"]
        report.note(f"{rows} test rows a point; by row: every answer of the row right.")
    if "bank" in shown:
        report.heading("A bank of documents that training never saw")
        report.table(*shown["bank"])
        banks = {name: m["bank"] for name, m in models.items() if m["bank"]}
        report.picture("bank", plots.by_documents(banks), "hits and answers by documents of a bank")
        report.note(
            f"{next(iter(banks.values()))[0]['questions']} questions, each about one document or a few. hit@1: the "
            "best document is one of these; hit@k: one of those read is; recall@k: the share of these that is read; "
            "precision: the share of what is read that is one of these; answers: every token right; deleted: the same "
            "with every document asked about deleted from the bank."
        )
    if "interleaved" in shown:
        report.heading("Questions answered by reading on")
        report.table(*shown["interleaved"])
        questions = models[subjects[0].name]["interleaved"][0]["questions"]
        report.note(
            f"{questions} questions, to as many banks as these take. hop: read right so far, one document a round, "
            "each named by the model; answers: exact, as written; deleted: the same without the document that holds "
            "the answer."
        )
    texts = {f"{n}, {how}": t for n, read in _by_source(models, "text").items() for how, t in read.items()}
    if texts:
        first = next(iter(texts.values()))
        report.heading("Held-out text by position")
        report.table(*shown["text"])
        bits = {f"{name}: {t['bits_per_byte']:.3f}": t["by_position"] for name, t in texts.items()}
        picture = plots.by_position(bits, first["edges"], "bits per byte", "over all positions")
        report.picture("text", picture, "bits per byte by position")
        report.note(
            f"{first['documents']} documents, {first['tokens']:,} tokens, read in segments of {first['segment']}; "
            "carried: one memory for a document; reset: a new one each segment. Same tokens scored either way."
        )
        if len({m["tokenizer"] for m in models.values()}) > 1:
            report.note("Tokens are not the same for all models: each was given the same bytes of every document.")
        surprises = {
            f"{n}, {name.removesuffix('/surprise')}": values
            for n, read in _by_source(models, "text").items()
            for name, values in read["carried"]["of_tokens"].items()
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
