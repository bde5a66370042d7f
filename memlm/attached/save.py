"""Attached memories in files: alone, beside the name of their backbone, or with all weights of the model.

memlm_memory.json           the settings; the name and the fingerprint of the backbone
memlm_memory.safetensors    the memory's weights; a folder of ``save_pretrained`` has them in the model's files
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from memlm import card, files
from memlm.attached.call import Attached
from memlm.attached.layers import NAME, decoder_of, of
from memlm.fingerprint import digest_of, stored
from memlm.settings import require

WORDS, WEIGHTS = "memlm_memory.json", "memlm_memory.safetensors"
MEMORY = f".{NAME}."


def save_memory(model: PreTrainedModel, directory: str | Path) -> None:
    """Write the memory of a model, without the backbone, to ``directory``. Raises ValueError if it has none."""
    words = _words(model)
    tensors = {name: x.contiguous() for name, x in model.state_dict().items() if MEMORY in name}
    files.write_tensors(Path(directory) / WEIGHTS, tensors, {"format": "pt"})
    files.write(Path(directory) / WORDS, json.dumps(words, indent=1))
    card.write(directory)


def save_pretrained(model: PreTrainedModel, save_directory: str | Path, **kwargs: Any) -> None:
    """``PreTrainedModel.save_pretrained``, and the settings of the model's memory and a card."""
    if not kwargs.get("is_main_process", True):
        type(model).save_pretrained(model, save_directory, **kwargs)
        return
    words, folder = _words(model), Path(save_directory)
    files.make_folder(folder)
    type(model).save_pretrained(model, save_directory, **kwargs)
    files.drop_earlier_weights(folder)
    if getattr(model, "_hf_peft_config_loaded", False):
        # transformers writes the adapter alone.
        save_memory(model, folder)
        return
    (folder / WEIGHTS).unlink(missing_ok=True)
    _write_settings(words, folder)


def upload(model: PreTrainedModel, working_dir: str | Path, repo_id: str, *args: Any, **kwargs: Any) -> Any:
    """The last part of transformers' ``push_to_hub``, with the settings of the model's memory and its card."""
    _write_settings(_words(model), working_dir, repo_id)
    return type(model)._upload_modified_files(model, working_dir, repo_id, *args, **kwargs)


def _write_settings(words: dict[str, Any], directory: str | Path, name: str | None = None) -> None:
    files.write(Path(directory) / WORDS, json.dumps(words, indent=1))
    card.write(directory, name)


def _words(model: PreTrainedModel) -> dict[str, Any]:
    settings = of(model)
    require(settings is not None, f"{type(model).__name__} has no memory; memlm.attach one first")
    require(
        isinstance(model, PreTrainedModel),
        f"{type(model).__name__} is no PreTrainedModel; give the model inside it, such as peft_model.get_base_model()",
    )
    memories = [m for path, m in model.named_modules() if MEMORY in f".{path}."]
    require(
        not any(type(m).__module__.startswith("peft.") for m in memories),
        "the memory has adapters of PEFT or is one of its modules_to_save; save it by PEFT, or merge_and_unload first",
    )
    # The model may have changed its dtype.
    dtype = next(m.gate.dtype for m in memories if isinstance(m, Attached))
    settings = dataclasses.replace(settings, dtype=str(dtype).removeprefix("torch."))
    name = model.config.name_or_path
    return {
        "attached": dataclasses.asdict(settings),
        "backbone": name,
        "class": type(model).__name__,
        "fingerprint": fingerprint_of(model),
    }


def fingerprint_of(model: PreTrainedModel) -> str:
    """A hash of the backbone's weights without the head, the same with and without a memory."""
    decoder = decoder_of(model)
    own = ((name, x) for name, x in stored(decoder) if not f".{name}".count(MEMORY))
    return digest_of(own, model.config.model_type)
