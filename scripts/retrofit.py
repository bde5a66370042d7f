#!/usr/bin/env python
"""The parts of experiment=retrofit that train.py has not: a new Llama, and LoRA as the control of the memory.

    python scripts/retrofit.py llama --seed 0  # writes runs/retrofit/new-seed0, untrained
    python scripts/retrofit.py lora --seed 0  # trains LoRA as experiment=retrofit trains the memory; needs peft

LoRA has as many parameters as the memory (rank 18), and the same backbone, window, data, order and steps. Its learning
rate is its own. The result, in runs/retrofit/lora-seed0, is the backbone with LoRA merged into its weights. A closed
memory beside it, which has no effect, gives it the window.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from memlm.cli import composed
from memlm.data import build_data, byte_tokenizer, save_tokenizer
from memlm.flops import count_parameters
from memlm.training import checkpoint
from memlm.training.model import build
from memlm.training.objective import Objective, model_inputs
from memlm.training.optim import build_optimizers, lr_factor, set_lr
from memlm.training.resume import Record
from memlm.training.settings import RunSettings

ROOT = Path(__file__).resolve().parent.parent
RANK, LORA_LR = 18, 3e-3


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("llama", "lora"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a folder; by default in runs/retrofit")
    parser.add_argument("settings", nargs="*", help="of experiment=retrofit, for lora: key=value")
    given = parser.parse_intermixed_args(arguments)
    name = "new" if given.part == "llama" else "lora"
    out = given.out or Path(f"runs/retrofit/{name}-seed{given.seed}")
    if given.part == "llama":
        if given.settings:
            parser.error(f"{given.settings[0]}: settings are of experiment=retrofit, for lora; leave them out")
        llama(given.seed, out)
    else:
        lora(given.seed, out, given.settings)


def llama(seed: int, out: Path) -> None:
    """A new LlamaForCausalLM over bytes, of two layers of width 64, and its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=168,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=4096,
        # About 1 / sqrt(hidden_size); the usual 0.02 suits widths in the thousands.
        initializer_range=0.1,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(out)
    save_tokenizer(tokenizer, out)
    print(f"{out}: a Llama of {count_parameters(model):,} parameters")


def lora(seed: int, out: Path, overrides: Sequence[str] = ()) -> None:
    """Train LoRA on the data of experiment=retrofit, and save the model that it gives."""
    from peft import LoraConfig, get_peft_model

    choices = ("experiment=retrofit", f"seed={seed}", f"run_dir={out}", f"optim.lr={LORA_LR}", *overrides)
    settings = RunSettings.of(composed(ROOT / "configs", "train", choices))
    train, optim = settings.train, settings.optim
    torch.manual_seed(seed)
    tokenizer, mixture = build_data(settings.config["data"], seed=seed, batch_size=train.batch_size)
    model = build(settings.config["model"], tokenizer)
    adapted = get_peft_model(
        model,
        LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", exclude_modules=r".*\.memlm\..*"),
    )
    print(f"LoRA of {count_parameters(adapted, trained=True):,} parameters")
    objective, optimizers = Objective(model.train()), build_optimizers(adapted, optim)
    for step in range(train.steps):
        set_lr(optimizers, lr_factor(step, optim.schedule_steps or train.steps, optim))
        loss, _, _ = objective(**model_inputs(mixture.batch(step), model.device), output_metrics=False)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapted.parameters(), optim.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % train.log_every == 0 or step == train.steps - 1:
            print(f"step {step}/{train.steps}  loss {loss.item():.3f}", flush=True)
    record = Record(settings.config, mixture.manifests, {"step": train.steps}).texts()
    trainer = {"step": train.steps, "optimizers": []}
    merged = adapted.merge_and_unload()
    print(checkpoint.save(out, train.steps, merged, checkpoint.Beside(tokenizer, trainer, record), keep=1))


if __name__ == "__main__":
    main()
