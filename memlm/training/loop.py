"""The training loop: batches that are pure functions of the step, so a run is its configuration and a step number."""

import json
import math
import signal
import time
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import gather_object
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import memlm
from memlm import files
from memlm.configuration import MemLMConfig
from memlm.data import Batch, TextSource, build_data, check_manifest, left_out, token_bytes
from memlm.hub import load_model
from memlm.memory.base import build_config
from memlm.modeling import MemLMForCausalLM, count_flops, count_parameters
from memlm.training import checkpoint
from memlm.training.display import Display
from memlm.training.objective import Objective, Score, model_inputs, score
from memlm.training.optim import build_optimizers, lr_factor, set_lr
from memlm.training.settings import OptimSettings, TrainSettings
from memlm.training.tracking import Tracker
from memlm_kernels import set_backend

# What may differ between a run and its continuation.
_FREE = {"hardware", "tracker", "run_dir"}


class Interrupt:
    """The first Ctrl-C or SIGTERM asks for a checkpoint at the end of the step; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
        for s in self._before:
            signal.signal(s, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def restore(self) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)


def run(cfg: DictConfig) -> None:
    """Train what the configuration describes, or go on where its run directory stops.

    Raises ValueError, one line, for what the user can mend.
    """
    with set_backend(cfg.hardware.kernels, "hardware.kernels"):
        Trainer(cfg).train()


class Trainer:
    """Everything that a run needs, built once."""

    def __init__(self, cfg: DictConfig) -> None:
        self.config = OmegaConf.to_container(cfg, resolve=True)
        self.cfg = cfg
        self.settings = build_config(TrainSettings, self.config["train"], "train")
        self.optim = build_config(OptimSettings, self.config["optim"], "optim")
        if not cfg.run_dir:
            raise ValueError(f"run_dir={cfg.run_dir!r} names no folder; leave it out, or name one")
        self.run_dir = Path(cfg.run_dir)
        self.accelerator = build_accelerator(cfg.hardware, self.settings.gradient_accumulation)
        self.display = Display(self.settings.steps, self.accelerator.is_main_process)
        self.folder = checkpoint.latest(self.run_dir)
        _same_run(self.run_dir, self.folder, self.config)
        self.trainer_state = checkpoint.load_trainer(self.folder) if self.folder else None
        self.step = self.trainer_state["step"] if self.trainer_state else 0

        with self.accelerator.main_process_first():
            self.tokenizer, self.mixture = build_data(
                self.config["data"],
                seed=cfg.seed,
                batch_size=self.settings.batch_size * self._parts,
            )
        for name, manifest in self.mixture.manifests.items():
            before = self.run_dir / f"manifest-{name}.json"
            if self.folder and before.exists():
                check_manifest(name, files.read_json(before), manifest)
        self.texts = [name for name, source in self.mixture.sources.items() if isinstance(source, TextSource)]
        self.token_bytes = torch.from_numpy(token_bytes(self.tokenizer))
        self.model = self._build_model()
        self.optimizers = build_optimizers(self.model, self.optim)
        if self.trainer_state:
            for optimizer, state in zip(self.optimizers, self.trainer_state["optimizers"], strict=True):
                optimizer.load_state_dict(state)
        if any(getattr(module, "without_gradient", None) for module in self.model.modules()):
            # Ranks would wait for gradients that may not come.
            self.accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
        objective = Objective(self.model, self.settings.lm_weight)
        if cfg.hardware.compile:
            objective.compile()
        self.objective, *self.optimizers = self.accelerator.prepare(objective, *self.optimizers)
        if self.trainer_state and "scaler" in self.trainer_state:
            self.accelerator.scaler.load_state_dict(self.trainer_state["scaler"])

    def _build_model(self) -> MemLMForCausalLM:
        if self.folder:
            model = load_model(self.folder)
        else:
            config = model_config(self.config["model"], self.tokenizer)
            torch.manual_seed(self.cfg.seed)
            model = MemLMForCausalLM(config)
            if self.settings.init_from:
                folder = checkpoint.copy_weights(self.settings.init_from, model, self.tokenizer)
                self.display.say(f"weights: {folder}")
        if self.settings.gradient_checkpointing:
            # Renamed in transformers 5.23.
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        return model.train()

    def train(self) -> None:
        """Take the steps that are left; say so where there are none."""
        if self.step >= self.settings.steps:
            self.display.say(
                f"{self.run_dir}: all {self.step} steps are done. Train anew under another name (name=...), "
                f"or go further with train.steps=... in a new run."
            )
            return
        if self.accelerator.is_main_process:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            OmegaConf.save(OmegaConf.create(self.config), self.run_dir / "config.yaml")
            for name, manifest in self.mixture.manifests.items():
                # Bits per byte are comparable between runs of one manifest only.
                files.write(self.run_dir / f"manifest-{name}.json", json.dumps(manifest, indent=1))
        self._banner()
        tracker = None
        if self.accelerator.is_main_process:
            name = str(self.cfg.name)
            tracker = Tracker(self.run_dir, name, dict(self.cfg.tracker), self.config, self.step)
        interrupt = Interrupt()
        try:
            with self.display:
                stopped = self._steps(tracker, interrupt)
        finally:
            interrupt.restore()
            if tracker:
                tracker.close()
        if stopped:
            self.display.say(f"Stopped at step {self.step}; the same command goes on from there.")
        else:
            self.display.say(f"Done: {checkpoint.latest(self.run_dir)}")

    def _steps(self, tracker: Tracker | None, interrupt: Interrupt) -> bool:
        """Train to the end, or until interrupted: then True."""
        settings, shown = self.settings, {}
        clock, clock_step = time.perf_counter(), self.step
        while self.step < settings.steps:
            logged = self.step % settings.log_every == 0 or self.step == settings.steps - 1
            saved = (self.step + 1) % settings.save_every == 0
            figures = self._one_step()
            # With several processes, asking the others costs a wait: only where there is one already.
            stop = self._any(interrupt.asked) if logged or self.accelerator.num_processes == 1 else False
            if logged or saved or stop:
                values = self._read(figures)
            if logged:
                now = time.perf_counter()
                speed = (self.step - clock_step) * self.tokens_per_step() / (now - clock)
                clock, clock_step = now, self.step
                if tracker:
                    tracker.log(self.step - 1, {**values, "tokens_per_second": speed})
                shown |= {"loss": f"{values['loss']:.3f}", "tok/s": f"{speed:,.0f}"}
                self.display.advance(self.step, shown)
            before = time.perf_counter()
            last = self.step == settings.steps
            if self.step % settings.validate_every == 0 or last:
                scores = self.validate()
                if tracker:
                    tracker.log(self.step, self._validation_figures(scores))
                bits = {n: f"{s.bits_per_byte:.3f} bits/byte" for n, s in scores.items() if n in self.texts}
                right = {n: f"{s.accuracy:.3f} right" for n, s in scores.items() if n not in self.texts}
                told = ", ".join(f"{name}: {figure}" for name, figure in (bits | right).items())
                self.display.say(f"step {self.step}  validation  {told}")
                shown |= {name: figure for name, figure in list(bits.items())[:1]}
            if saved or last or stop:
                self._save()
            clock += time.perf_counter() - before
            if stop and not last:
                return True
        return False

    def _one_step(self) -> dict[str, Tensor]:
        """One optimiser step; figures stay on the device. ``rows``: loss and number of rows of each source."""
        parts, sources = self.settings.gradient_accumulation, len(self.mixture.sources)
        factor = lr_factor(self.step, self.settings.steps, self.optim.warmup_steps, self.optim.final_lr)
        set_lr(self.optimizers, factor)
        total = torch.zeros((), device=self.accelerator.device)
        per_source = torch.zeros(sources, 2, device=self.accelerator.device)
        told: dict[str, list[Tensor]] = {}
        for batch in self._batches(self.step, "train"):
            inputs = model_inputs(batch, self.accelerator.device)
            with self.accelerator.accumulate(self.objective):
                loss, rows, metrics = self.objective(**inputs)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(self.objective.parameters(), self.optim.clip)
                for optimizer in self.optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
            total += loss.detach() / parts
            for name, value in metrics.items():
                told.setdefault(name, []).append(value)
            of_rows = torch.stack([rows.float(), torch.ones_like(rows)], 1)
            per_source.index_add_(0, batch.source_ids.to(per_source.device), of_rows)
        self.step += 1
        means = {name: torch.stack(values).nanmean() for name, values in told.items()}
        return {"loss": total, "grad_norm": torch.as_tensor(norm), "rows": per_source, **means}

    @property
    def _parts(self) -> int:
        """Forwards of one step, over all processes."""
        return self.settings.gradient_accumulation * self.accelerator.num_processes

    def _batches(self, step: int, split: str) -> Iterator[Batch]:
        """This process's parts of a step's batch."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        return (self.mixture.batch(step, split, part, self._parts) for part in range(rank, self._parts, processes))

    def _read(self, figures: dict[str, Tensor]) -> dict[str, float]:
        """Figures as numbers, losses over all processes; stops a run whose loss is not finite. A metric that no row
        has is left out.
        """
        rows, loss = figures.pop("rows"), figures.pop("loss")
        if self.accelerator.num_processes > 1:
            rows, loss = self.accelerator.reduce(rows), self.accelerator.reduce(loss, "mean")
        values = {"loss": loss.item(), **{name: value.item() for name, value in figures.items()}}
        for name, (total, count) in zip(self.mixture.sources, rows.tolist(), strict=True):
            if count:
                values[f"loss/{name}"] = total / count
        # fp16's loss scaling skips steps whose gradients overflow; there only the loss tells.
        told = ("loss", "grad_norm") if self.accelerator.scaler is None else ("loss",)
        if not all(math.isfinite(values[name]) for name in told):
            kept = checkpoint.latest(self.run_dir)
            raise ValueError(
                f"loss is {values['loss']}, gradient norm {values['grad_norm']} at step {self.step - 1}; lower "
                f"optim.lr or optim.muon_lr" + (f" ({kept} stays as it is)" if kept else "")
            )
        return {name: value for name, value in values.items() if name in told or not math.isnan(value)}

    def validate(self) -> dict[str, Score]:
        """Score of each source on ``validation_batches`` batches of the validation split, over all ranks."""
        model = self.accelerator.unwrap_model(self.objective).model
        steps = range(self.settings.validation_batches)
        batches = chain.from_iterable(self._batches(step, "validation") for step in steps)
        with self.accelerator.autocast():
            scores = score(model, batches, list(self.mixture.sources), self.token_bytes, self.accelerator.device)
        if self.accelerator.num_processes > 1:
            # Objects, for ranks may have had rows of different sources, and other metrics.
            ranks = gather_object([scores])
            scores = {name: sum((of_rank[name] for of_rank in ranks), Score()) for name in scores}
        return scores

    def _validation_figures(self, scores: dict[str, Score]) -> dict[str, float]:
        figures = {}
        for name, s in scores.items():
            figures |= {f"validation/{name}/loss": s.loss, f"validation/{name}/accuracy": s.accuracy}
            if name in self.texts:
                figures[f"validation/{name}/bits_per_byte"] = s.bits_per_byte
            figures |= {f"validation/{name}/{metric}": value for metric, value in s.metrics.items()}
        return figures

    def _save(self) -> None:
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            model = self.accelerator.unwrap_model(self.objective).model
            state: dict[str, Any] = {"step": self.step, "optimizers": [o.state_dict() for o in self.optimizers]}
            if self.accelerator.scaler is not None:
                state["scaler"] = self.accelerator.scaler.state_dict()
            checkpoint.save(self.run_dir, self.step, model, self.tokenizer, state, self.settings.keep)
        self.accelerator.wait_for_everyone()

    def _any(self, flag: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device)).item())

    def tokens_per_step(self) -> int:
        return self.mixture.batch_size * self.config["data"]["seq_len"]

    def _banner(self) -> None:
        device, precision = self.accelerator.device, self.accelerator.mixed_precision
        where = f"{device} ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)
        if self.accelerator.num_processes > 1:
            where = f"{self.accelerator.num_processes} processes, {where}"
        kinds = ", ".join(dict.fromkeys(m["kind"] for m in self.model.config.mixers.values()))
        mixture = ", ".join(f"{name} {count}" for name, count in self.mixture.counts.items())
        total = self.tokens_per_step() * self.settings.steps
        flops = count_flops(self.model.config, self.config["data"]["seq_len"])
        say = self.display.say
        say(
            f"memlm {memlm.__version__}: {kinds}, {count_parameters(self.model):,} parameters, "
            f"{flops / 1e6:,.1f} MFLOPs a token forward, on {where}, {'fp32' if precision == 'no' else precision}"
        )
        if device.type == "cpu":
            say("no GPU: the preset for CPUs, minutes long")
        say(f"rows a batch: {mixture}; {self.settings.steps:,} steps x {self.tokens_per_step():,} tokens = {total:,}")
        for name, manifest in self.mixture.manifests.items():
            if reasons := left_out(manifest):
                say(f"data.sources.{name}: {len(manifest['files'])} files; not read: {reasons} (manifest-{name}.json)")
        say(f"run: {self.run_dir}" + (f", going on from step {self.step}" if self.step else ""))


def build_accelerator(hardware: Mapping[str, Any], gradient_accumulation: int) -> Accelerator:
    """accelerate's view of the machine; ``mixed_precision: auto`` is bf16 on GPUs that have it, else fp32."""
    if hardware["device"] not in ("auto", "cpu", "cuda"):
        raise ValueError(f"hardware.device={hardware['device']!r} is unknown; use auto, cpu or cuda")
    if hardware["device"] == "cuda" and not torch.cuda.is_available():
        raise ValueError("hardware.device='cuda' but torch sees no GPU; use hardware.device=auto")
    precision = hardware["mixed_precision"]
    on_gpu = hardware["device"] != "cpu" and torch.cuda.is_available()
    if precision == "auto":
        precision = "bf16" if on_gpu and torch.cuda.is_bf16_supported() else "no"
    if precision not in ("no", "bf16", "fp16"):
        raise ValueError(f"hardware.mixed_precision={precision!r} is unknown; use auto, no, bf16 or fp16")
    return Accelerator(
        cpu=not on_gpu,
        mixed_precision=precision,
        gradient_accumulation_steps=gradient_accumulation,
    )


def model_config(settings: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> MemLMConfig:
    """The model group as a configuration, its vocabulary taken from the tokenizer unless set."""
    entries = len(tokenizer)
    size = settings.get("vocab_size") or entries
    if size < entries:
        raise ValueError(f"model.vocab_size={size} is less than the tokenizer's {entries} entries; leave it out")
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return MemLMConfig.from_hydra({**settings, **special, "vocab_size": size})


def _same_run(run_dir: Path, folder: Path | None, config: dict[str, Any]) -> None:
    """Refuse to go on in a directory whose run was another one; name the first key that differs."""
    if folder is None or not (run_dir / "config.yaml").exists():
        return
    before = OmegaConf.to_container(OmegaConf.load(run_dir / "config.yaml"))
    for key, old, new in _differences(before, config, ""):
        if key.split(".")[0] not in _FREE:
            raise ValueError(
                f"{key}={new!r}, but the run in {run_dir} has {old!r}; choose another name=..., or delete {run_dir}"
            )


def _differences(a: Any, b: Any, key: str) -> list[tuple[str, Any, Any]]:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [*a, *(k for k in b if k not in a)]
        return [d for k in keys for d in _differences(a.get(k), b.get(k), f"{key}.{k}" if key else k)]
    return [] if a == b else [(key, a, b)]
