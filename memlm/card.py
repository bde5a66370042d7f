"""The model card of a checkpoint, ``README.md``: made from the checkpoint's files, never over a page of the user.

A card ends with a digest of its text. The text is replaced only while the digest fits, so an edited card stays. The
metadata above the text may be added to, for example a license.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open
from transformers.utils.hub import ModelCard, ModelCardData

from memlm import files
from memlm.memory.base import kinds as all_kinds
from memlm.memory.base import load_kind

# The settings of a memory beside the attention of another model.
ATTACHED = "memlm_memory.json"
_MARK = "<!-- memlm made this card. An edited card is not replaced. sha256:{} -->"
# The description with which transformers fills a repository without a card.
_EMPTY = (
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub. "
    "This model card has been automatically generated."
)
_SIZES = (
    "{num_hidden_layers} layers of width {hidden_size}; {num_attention_heads} attention heads of {head_dim}, "
    "{num_key_value_heads} for keys and values; MLPs of {intermediate_size}; {vocab_size} tokens."
)
_USE = """source = "{source}"
model = {model}
tokenizer = AutoTokenizer.from_pretrained({tokenizer}{trust})
text = tokenizer("It was", return_tensors="pt")
print(tokenizer.decode(model.generate(**text, max_new_tokens=20)[0]))"""


def write(folder: str | Path, name: str | None = None, run: Path | None = None) -> None:
    """Write the card of a checkpoint, unless the page that is there is a user's or edited by one.

    name: of the checkpoint's repository on the Hub
    run: a folder with the settings and manifests of its run; the card then has them, and the reports of
        ``evaluate.py`` in ``folder``
    """
    folder = Path(folder)
    config, attached = (_json(folder / file) for file in ("config.json", ATTACHED))
    metadata = _metadata(folder / files.CARD)
    if not config | attached or metadata is None:
        return
    layers = _layers(config, attached)
    kinds = list(dict.fromkeys(kind for _, kind in layers))
    parts = [*_opening(folder, config, attached, kinds, name), *_architecture(config, attached, layers)]
    if run is not None:
        parts += [*_training(run), *_results(folder)]
    text = "\n\n".join(parts)
    others = [tag for tag in metadata.get("tags") or [] if tag not in all_kinds()]
    tags = dict.fromkeys([*others, "memlm", *kinds])
    metadata |= {"library_name": "memlm" if attached else "transformers", "pipeline_tag": "text-generation"}
    if backbone := _backbone(attached):
        metadata["base_model"] = backbone
    front = ModelCardData(**{**metadata, "tags": [*tags]}).to_yaml()
    files.write(folder / files.CARD, f"---\n{front}\n---\n\n{text}\n\n{_MARK.format(_digest(text))}\n")


def _metadata(path: Path) -> dict[str, Any] | None:
    """The metadata of the card at ``path``, to be kept; None if its text is a user's."""
    if not path.exists():
        return {}
    try:
        card = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    except (OSError, ValueError, yaml.YAMLError):
        return None
    *text, mark = card.text.strip().rsplit("\n", 1)
    ours = mark == _MARK.format(_digest("".join(text)))
    return card.data.to_dict() if ours or _is_empty(card) else None


def _digest(text: str) -> str:
    return hashlib.sha256(text.replace("\r", "").strip().encode()).hexdigest()


def _is_empty(card: ModelCard) -> bool:
    return (
        _EMPTY in card.text
        and card.text.split() == ModelCard.from_template(ModelCardData(), model_description=_EMPTY).text.split()
    )


def _json(path: Path) -> dict[str, Any]:
    return files.read_json(path) if path.is_file() else {}


def _layers(config: Mapping[str, Any], attached: Mapping[str, Any]) -> dict[tuple[str, str], list[int]]:
    """The layers of each mixer, by its name and kind; none for a model without a memory."""
    if attached:
        settings = attached["attached"]
        return {("memory", settings["memory"]["kind"]): settings["layers"]}
    layers: dict[tuple[str, str], list[int]] = {}
    for layer in range(config["num_hidden_layers"] if "mixers" in config else 0):
        name = config["mixer_pattern"][layer % len(config["mixer_pattern"])]
        layers.setdefault((name, config["mixers"][name]["kind"]), []).append(layer)
    return layers


def _backbone(attached: Mapping[str, Any]) -> str | None:
    """The backbone's name on the Hub, if it came from there."""
    name = attached.get("backbone") or ""
    return name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists() else None


def _opening(
    folder: Path, config: Mapping[str, Any], attached: Mapping[str, Any], kinds: list[str], name: str | None
) -> Iterator[str]:
    """The title, a sentence and the lines that load the model."""
    weights = [*folder.glob("model*.safetensors"), *folder.glob("memlm_memory.safetensors")]
    sizes = {weight: size for path in weights for weight, size in _sizes(path)}
    count = f"{sum(sizes.values()):,} parameters"
    kind = (config.get("architectures") or [attached.get("class") or "another model"])[0]
    tokens = "source"
    imported, trust, note = "from transformers import AutoModelForCausalLM, AutoTokenizer", "", None
    yield f"# {name or ', '.join(kinds) or kind}"
    if attached:
        own = sum(size for weight, size in sizes.items() if ".memlm." in weight)
        parts = (
            f"{count}, of which {own:,} are the memory's" if config else f"{count}; the backbone is not in this folder"
        )
        yield f"A memory of the package memlm beside the attention of {_backbone(attached) or kind}: {parts}."
        imported = "import memlm\nfrom transformers import AutoTokenizer"
        if config:
            note = "`AutoModelForCausalLM.from_pretrained` loads the backbone without its memory."
        else:
            tokens = "model.name_or_path"
            note = (
                "`memlm.from_pretrained` loads the backbone by its name; `memlm.load_memory(model, source)` gives the "
                "memory to a backbone that is loaded already."
            )
    elif kinds:
        yield f"A language model of the package memlm, whose layers hold {' and '.join(kinds)}: {count}."
        trust = ", trust_remote_code=True"
        note = "The code of `trust_remote_code` imports memlm; after `import memlm` you can leave the argument out."
    else:
        yield f"A language model of transformers, without a memory: {count}."
    yield "## Use"
    call = f"{'memlm' if attached else 'AutoModelForCausalLM'}.from_pretrained(source{trust})"
    use = _USE.format(source=name or "path/of/this/folder", model=call, tokenizer=tokens, trust=trust)
    install = "# pip install memlm\n" if kinds else ""
    yield f"```python\n{install}{imported}\n\n{use}\n```"
    if note:
        yield note


def _sizes(path: Path) -> Iterator[tuple[str, int]]:
    """The name and the number of elements of each weight in a file."""
    with safe_open(path, "pt") as weights:
        for name in weights.keys():  # noqa: SIM118
            yield name, math.prod(weights.get_slice(name).get_shape())


def _architecture(
    config: Mapping[str, Any], attached: Mapping[str, Any], layers: Mapping[tuple[str, str], list[int]]
) -> Iterator[str]:
    yield "## Architecture"
    if "mixers" in config:
        yield _SIZES.format(**config)
    if layers:
        found = layers.items()
        rows = [[", ".join(map(str, at)), f"{name}: `{kind}`", _described(kind)] for (name, kind), at in found]
        yield _table(["layers", "mixer", ""], rows)
    if taps := config.get("taps"):
        yield f"The layers behind the first memory add its reads to their inputs, one each: {', '.join(taps)}."
    for file, content in (("config.json", config), (ATTACHED, attached)):
        if content:
            yield _folded(f"All settings ({file})", "json", json.dumps(without_places(content), indent=1))


def _described(kind: str) -> str:
    """The first paragraph of a memory's docstring."""
    text = (load_kind(kind, "kind").__doc__ or "").strip().split("\n\n")[0]
    return " ".join(text.split())


def _training(folder: Path) -> Iterator[str]:
    """Settings and data of a run; nothing if the folder has no settings."""
    try:
        settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        data, train = settings["data"], settings["train"]
        size, length, steps = train["batch_size"], data["seq_len"], train["steps"]
        sources = {name: [source["kind"], f"{source['weight']:g}"] for name, source in data["sources"].items()}
        facts = _json(folder / "run.json")
        text = f"Step {facts.get('step', steps):,} of {steps:,}, each of {size:,} rows of {length:,} tokens"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return
    yield "## Training"
    told = {"seed": settings.get("seed"), **{name: facts.get(name) for name in ("torch", "memlm")}}
    yield "; ".join([text, *(f"{name} {value}" for name, value in told.items() if value is not None)]) + "."
    for name, row in sources.items():
        row.append(_manifest(_json(folder / f"manifest-{name}.json")))
    yield _table(["source", "kind", "weight", "files"], [[name, *row] for name, row in sources.items()])
    chosen = {key: without_places(settings[key]) for key in ("data", "optim", "train") if key in settings}
    yield _folded("Settings of the run", "yaml", yaml.safe_dump(chosen, sort_keys=False).strip())


def _manifest(manifest: Mapping[str, Any]) -> str:
    if not manifest:
        return "none: made by rule"
    entries = manifest.get("files", [])
    parts = [f"{len(entries):,} of {sum(file.get('bytes', 0) for file in entries):,} bytes"]
    for split, counts in manifest.get("splits", {}).items():
        parts.append(f"{split}: " + ", ".join(f"{count:,} {name}" for name, count in counts.items()))
    return "; ".join(parts)


def without_places(node: Any) -> Any:
    """Settings, or a text, without the directories of the machine."""
    if isinstance(node, dict):
        return {key: without_places(value) for key, value in node.items() if key != "cache_dir"}
    if isinstance(node, list):
        return [without_places(value) for value in node]
    return re.sub(r"(?<![\w.:/~<])~?/(?:[^\s/|,;]+/)*(?=[^\s/|,;])", "", node) if isinstance(node, str) else node


def _results(folder: Path) -> Iterator[str]:
    """The reports of ``evaluate.py`` in the folder, with their pictures."""
    for report in sorted(folder.glob("evaluation*/report.md")):
        title, _, text = report.read_text(encoding="utf-8").partition("\n")
        yield f"## Results: {title.removeprefix('# memlm: ')}"
        text = re.sub(r"^## ", "### ", text, flags=re.MULTILINE)
        yield text.replace("](plots/", f"]({report.parent.name}/plots/").strip()


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = (header, ["---"] * len(header), *rows)
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)


def _folded(title: str, language: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n```{language}\n{text}\n```\n\n</details>"
