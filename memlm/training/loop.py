"""The training loop. Batches are pure functions of the step, so configuration and step number determine a run."""

import math
import time
from contextlib import nullcontext
from functools import cached_property
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import broadcast_object_list, gather_object
from omegaconf import DictConfig
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import memlm
from memlm import files
from memlm.data import Mixture, TextSource, build_data, token_bytes
from memlm.flops import count_flops, count_parameters
from memlm.hub.causal import load_any
from memlm.modeling import MemLMForCausalLM
from memlm.settings import require
from memlm.training import banner, checkpoint, plan, resume, sequence, telemetry, trainable
from memlm.training.alerts import Alerts
from memlm.training.devices import build_accelerator, precision
from memlm.training.display import Display
from memlm.training.ema import WeightAverage
from memlm.training.feed import Feed
from memlm.training.guard import Guard, keep_batches
from memlm.training.interrupt import Agreement, Interrupt, Stopped
from memlm.training.model import build, check, check_length, checkpoint_layers, described, expected, without_dropout
from memlm.training.objective import Objective, Score, score
from memlm.training.optim import build_optimizers, lr_factor, set_lr
from memlm.training.preparing import Preparing
from memlm.training.settings import RunSettings
from memlm.training.sharded_checkpoint import Saver, State, consolidate, has_parts, load_optimizers, skeleton
from memlm.training.sharding import Sharding
from memlm.training.shards import whole
from memlm.training.tracking import Tracker, is_validated
from memlm_kernels import set_backend


def run(cfg: DictConfig) -> None:
    """Train as the configuration describes, or continue the run in its directory.

    Raises ValueError, one line, for mistakes that the user can fix, and ``Stopped`` if a signal ends the run.
    """
    settings = RunSettings.of(cfg)
    if settings.dry_run:
        plan.show(settings, precision(settings.hardware))
        return
    with set_backend(settings.hardware.kernels, "hardware.kernels"), Interrupt() as interrupt:
        accelerator = build_accelerator(settings.hardware)
        with files.lock(settings.run_dir) if accelerator.is_main_process else nullcontext():
            Trainer(settings, accelerator).train(interrupt)


class Trainer:
    """All parts of a run, built once, by the holder of the run directory's lock."""

    def __init__(self, settings: RunSettings, accelerator: Accelerator) -> None:
        self.config, self.run_dir, self.settings = settings.config, settings.run_dir, settings.train
        self.run_settings, self.optim, self.accelerator = settings, settings.optim, accelerator
        sharers = settings.hardware.sharers(accelerator.num_processes)
        # Texts may take hours to prepare, so mistakes come first.
        self.settings.forwards(sequence.rows_of(settings.hardware.sequence_parallel, accelerator.num_processes))
        self.display, self.shown = Display(self.settings.steps, accelerator.is_main_process), dict[str, str]()
        self.clock, self.alerts = telemetry.StepClock(accelerator.device), Alerts()
        self.folder = self._find_checkpoint()
        saved = checkpoint.load_trainer(self.folder) if self.folder else {}
        self.step = saved.get("step", 0)
        self.tokenizer, self.mixture = self._build_data()
        self.texts = [name for name, source in self.mixture.sources.items() if isinstance(source, TextSource)]
        self.token_bytes = torch.from_numpy(token_bytes(self.tokenizer))
        self.model = self._build_model()
        self.feed = Feed(settings, self.mixture, self.model, accelerator, saved.get("carried"))
        accelerator.gradient_accumulation_steps = self.feed.forwards * self.feed.pieces
        self.trained = saved.get("trained") or trainable.choose(self.model, self.settings.trainable)
        trainable.train_only(self.model, self.trained)
        self.sharding = Sharding(self.model, accelerator, sharers, settings.hardware.compile) if sharers > 1 else None
        self.objective = self._build_objective()
        self._build_state(saved)
        self.saver = Saver(self.state) if self.sharding else None
        self.guard = Guard(self.settings, saved.get("recent_losses", ()))

    def _build_data(self) -> tuple[PreTrainedTokenizerFast, Mixture]:
        """The data of the configuration, compared with those of the run before."""
        before = resume.Record.read(self.run_dir, self.folder) if self.folder else None
        if before:
            for line in before.compare_settings(self.run_dir, self.config, self.accelerator.num_processes):
                self.display.say(line)
        else:
            check(self.config["model"])
        data = before.data(self.folder, self.config) if before else self.config["data"]
        with Preparing(self.display) as preparing:
            tokenizer, mixture = build_data(
                data, seed=self.run_settings.seed, batch_size=self.settings.batch_size, preparation=preparing
            )
        if before:
            before.compare_data(self.folder, tokenizer, mixture.manifests)
        return tokenizer, mixture

    def _build_objective(self) -> Module:
        if any(getattr(module, "without_gradient", None) for module in self.model.modules()):
            # Otherwise ranks may wait for gradients that never come.
            self.accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
        objective = Objective(self.model, self.settings.lm_weight, self.settings.z_loss)
        if self.run_settings.hardware.compile and not self.sharding:
            objective.compile()
        # Evaluation mode: in the precision of the run, but without DDP.
        return self.accelerator.prepare_model(objective, evaluation_mode=self.sharding is not None)

    def _build_state(self, saved: dict[str, Any]) -> None:
        """Optimisers and averages, continued from ``saved`` and the files beside it. The model is where it trains."""
        optimizers = build_optimizers(self.model, self.optim)
        in_parts = self.folder is not None and has_parts(self.folder)
        if saved and not in_parts:
            load_optimizers(optimizers, saved)
        self.optimizers = [self.accelerator.prepare_optimizer(optimizer) for optimizer in optimizers]
        folder = None if in_parts else self.folder
        self.ema = WeightAverage(self.model, self.settings.ema, folder) if self.settings.ema else None
        self.state = State(self.model, self.optimizers, self.ema)
        if self.folder and in_parts:
            self.state.load(self.folder)
        if self.accelerator.scaler is not None and "scaler" in saved:
            self.accelerator.scaler.load_state_dict(saved["scaler"])

    def _find_checkpoint(self) -> Path | None:
        """The newest undamaged checkpoint; the main process finds it for all."""
        found: list[Path | None] = [None]
        if self.accelerator.is_main_process:
            found[0], lines = checkpoint.recover(self.run_dir)
            for line in lines:
                self.display.say(line)
        return (broadcast_object_list(found) if self.accelerator.num_processes > 1 else found)[0]

    def _build_model(self) -> PreTrainedModel:
        group = self.config["model"]
        if self.folder:
            model = skeleton(self.folder) if has_parts(self.folder) else load_any(self.folder)
            for tensor in chain(model.parameters(), model.buffers()):
                # Tensors of a mapped file are aligned differently from a new model's, so sums would round differently.
                tensor.data = tensor.data.clone()
            resume.compare_models(self.run_dir, described(model), expected(group, self.tokenizer, model))
        else:
            torch.manual_seed(self.run_settings.seed)
            model = build(group, self.tokenizer)
            if self.settings.init_from:
                folder, lines = checkpoint.copy_weights(self.settings.init_from, model, self.tokenizer)
                for line in [*lines, f"weights: {folder}"]:
                    self.display.say(line)
        check_length(model, self.config["data"]["seq_len"])
        without_dropout(model)
        checkpoint_layers(model, self.settings.gradient_checkpointing)
        return model.train()

    def train(self, interrupt: Interrupt) -> None:
        """Take the remaining steps; if there are none, print a line. Raises ``Stopped`` if a signal ends the run."""
        steps, main = self.settings.steps, self.accelerator.is_main_process
        # A run that was stopped before a validation does it first.
        due = 0 < self.step <= steps and bool(self._validated())
        pending = self._any(main and due and not is_validated(self.run_dir, self.step))
        if self.step >= steps and not pending:
            self.display.say(
                f"{self.run_dir}: all {self.step} steps are done. Go further with a larger train.steps, or train anew "
                "under another name (name=...)."
            )
            self._make_whole()
            return
        if main:
            for name, text in self._record().texts().items():
                if name != checkpoint.FACTS:
                    files.write(self.run_dir / name, text)
        with interrupt.after():
            for line in banner.lines(self):
                self.display.say(line)
        tracker = Tracker(self.run_settings, self.step) if main else None
        agreement, done = Agreement(interrupt, self.accelerator.num_processes), False
        interrupt.patient = True
        try:
            with self.display, self.saver or nullcontext():
                if pending:
                    self._validate(tracker, agreement)
                self._steps(tracker, agreement)
            done = not agreement.number
            if done:
                self._make_whole()
        finally:
            interrupt.patient = False
            if tracker:
                tracker.close(failed=not done)
        if agreement.number:
            self.display.say(f"Stopped at step {self.step}; the same command goes on from there.")
            raise Stopped(agreement.number)
        self.display.say(f"Done: {checkpoint.latest(self.run_dir)}")

    def _steps(self, tracker: Tracker | None, agreement: Agreement) -> None:
        """Train to the end, or until a signal. In both cases the last step is saved."""
        settings, saved = self.settings, self.step
        clock, clock_step = time.perf_counter(), self.step
        self.display.begin(self.step)
        while self.step < settings.steps and not agreement.number:
            logged = self.step % settings.log_every == 0 or self.step == settings.steps - 1
            figures = self._one_step(logged)
            agreement.poll()
            if logged and not self.guard.bad:
                values = telemetry.over_processes(self._read(figures))
                now, taken = time.perf_counter(), self.step - clock_step
                values |= self._speed((now - clock) / taken, taken)
                clock, clock_step = now, self.step
                for line in self.alerts.of(self.step - 1, values):
                    self.display.say(line)
                if tracker:
                    tracker.log(self.step - 1, values)
                self.shown |= {"loss": f"{values['loss']:.3f}", "tok/s": f"{values['tokens_per_second']:,.0f}"}
                if "mfu" in values:
                    self.shown["MFU"] = f"{values['mfu']:.3f}"
            self.display.advance(self.step, self.shown if logged and not self.guard.bad else None)
            before = time.perf_counter()
            last = self.step == settings.steps
            if self._validated() and not agreement.number:
                self._validate(tracker, agreement)
            if self.step % settings.save_every == 0 or last:
                self._save(figures, tracker)
                saved = self.step
            clock += time.perf_counter() - before
        if saved < self.step:
            self._save(figures, tracker)

    def _speed(self, seconds: float, steps: int) -> dict[str, float]:
        """Figures of the last steps; seconds: of a step, without validations and checkpoints."""
        device, processes = self.accelerator.device, self.accelerator.num_processes
        flops = self.flops and self.flops[self.feed.lengths.stages.at(self.step - 1)]
        return {
            **telemetry.learning_rates(self.optimizers),
            **telemetry.rates(self.tokens_per_step() / seconds, flops, device, processes),
            **self.clock.read(steps),
            "seconds/step": seconds,
            "tokens": self.step * self.tokens_per_step(),
            "peak_memory": telemetry.peak_memory(device),
        }

    def _validated(self) -> dict[str, int]:
        """The splits that are validated after this step, and their batches: facts are probed more often."""
        due = self.step % self.settings.validate_every == 0 or self.step == self.settings.steps
        splits = {"probes": self.mixture.num_probe_batches} if due or self.step in self.mixture.probed else {}
        return splits | ({"validation": self.settings.validation_batches} if due else {})

    def _validate(self, tracker: Tracker | None, agreement: Agreement) -> None:
        """Log the scores on the validation split and of probes, unless a signal arrives first."""
        scores = self.validate(agreement)
        if agreement.number:
            return
        if tracker:
            tracker.log(self.step, self._validation_figures(scores))
        shown = {name: s for name, s in scores.items() if name in self.mixture.sources}
        bits = {n: f"{s.bits_per_byte:.3f} bits/byte" for n, s in shown.items() if n in self.texts}
        right = {n: f"{s.accuracy:.3f} right" for n, s in shown.items() if n not in self.texts}
        told = ", ".join(f"{name}: {figure}" for name, figure in (bits | right).items())
        if told:
            self.display.say(f"step {self.step}  validation  {told}")
        self.shown |= {name: figure for name, figure in list(bits.items())[:1]}

    def _one_step(self, logged: bool) -> dict[str, Tensor]:
        """One optimiser step. Returns figures on the device: losses; ``rows``, loss and number of rows by source; and
        if the step is logged, the mixers' metrics.
        """
        sources = len(self.mixture.sources)
        steps = self.optim.schedule_steps or self.settings.steps
        set_lr(self.optimizers, lr_factor(self.step, steps, self.optim))
        total = torch.zeros((), device=self.accelerator.device)
        per_source = torch.zeros(sources, 2, device=self.accelerator.device)
        told: dict[str, list[Tensor]] = {}
        norms: dict[str, Tensor] = {}
        self.clock.begin()
        if self.feed.carried:
            self.feed.carried.begin()
        for batch, inputs in self.feed.inputs(self.step):
            self.clock.lap("data")
            with self.accelerator.accumulate(self.sharding or self.objective):
                loss, rows, metrics = self.objective(**inputs, output_metrics=logged)
                if not loss.requires_grad:
                    raise ValueError("train.trainable: no trained parameter has an effect on the loss; choose others")
                self.clock.lap("forward")
                self.accelerator.backward(loss)
                self.clock.lap("backward")
                if self.accelerator.sync_gradients:
                    if self.sharding:
                        self.sharding.drop_unreached()
                    norm = self.accelerator.clip_grad_norm_(self.objective.parameters(), self.optim.clip)
                    part = total + loss.detach() / self.accelerator.gradient_accumulation_steps
                    self._judge(part, whole(norm))
                    if logged:
                        norms = telemetry.gradient_norms(self.model, whole(norm), self.optim.clip)
                for optimizer in self.optimizers:
                    if not self.guard.bad:
                        optimizer.step()
                    optimizer.zero_grad()
            total += loss.detach() / self.accelerator.gradient_accumulation_steps
            for name, value in metrics.items():
                told.setdefault(name, []).append(value)
            of_rows = torch.stack([rows.float(), torch.ones_like(rows)], 1)
            per_source.index_add_(0, batch.source_ids.to(per_source.device), of_rows)
            self.clock.lap("optimizer")
        self.step += 1
        if self.guard.bad and self.feed.carried:
            self.feed.carried.undo()
        if self.guard.bad and self.guard.action == "rewind":
            self._rewind()
        if self.ema and not self.guard.bad:
            self.ema.update(self.step)
        means = {name: torch.stack(values).nanmean() for name, values in told.items()}
        return {"loss": total, "grad_norm": whole(norm), "rows": per_source, **norms, **means}

    def _judge(self, loss: Tensor, norm: Tensor) -> None:
        """Tell the guard of a step, before its update."""
        # With fp16, loss scaling skips steps whose gradients overflow.
        checked = loss if self.accelerator.scaler is not None else loss + norm
        self.guard.note(self.step, checked.isfinite())
        if not self.guard.judges:
            return
        if self.accelerator.num_processes > 1:
            loss = self.accelerator.reduce(loss, "mean")
        try:
            reason = self.guard.judge(loss.item(), norm.item())
        except ValueError as error:
            raise ValueError(f"step {self.step}: {error}; its batch is in {self._keep_batches(self.step)}") from error
        if reason:
            self.display.say(f"step {self.step}: {reason}; no update, its batch is in {self._keep_batches(self.step)}")

    def _keep_batches(self, step: int) -> Path:
        return keep_batches(self.run_dir, step, self.accelerator.process_index, self.feed.batches(step, "train"))

    def _rewind(self) -> None:
        """Take weights and optimisers from the newest checkpoint. The steps go on behind the bad one."""
        if self.saver:
            self.saver.wait()
        folder = self._find_checkpoint()
        require(folder is not None, "train.on_nan=rewind, but the run has no checkpoint yet; lower train.save_every")
        self.state.load(folder)
        self.display.say(f"step {self.step}: goes on with the weights of {folder.name}")

    def _read(self, figures: dict[str, Tensor]) -> dict[str, float]:
        """Figures as numbers, losses averaged over all processes. Metrics that no row has are left out.

        Stops the run if the loss is not finite.
        """
        rows, loss = figures["rows"], figures["loss"]
        if self.accelerator.num_processes > 1:
            rows, loss = self.accelerator.reduce(rows), self.accelerator.reduce(loss, "mean")
        values = {name: value.item() for name, value in figures.items() if name != "rows"} | {"loss": loss.item()}
        for name, (total, count) in zip(self.mixture.sources, rows.tolist(), strict=True):
            if count:
                values[f"loss/{name}"] = total / count
        # With fp16, loss scaling skips steps whose gradients overflow, so only the loss is checked.
        told = ("loss", "grad_norm") if self.accelerator.scaler is None else ("loss",)
        if not all(math.isfinite(values[name]) for name in told):
            kept, first = checkpoint.latest(self.run_dir), self.guard.first
            first = self.step - 1 if first is None else first
            raise ValueError(
                f"loss is {values['loss']}, gradient norm {values['grad_norm']} at step {self.step - 1}, since step "
                f"{first}; lower optim.lr or optim.muon_lr, or set train.on_nan=skip; the batch of that step is in "
                f"{self._keep_batches(first)}" + (f" ({kept} stays as it is)" if kept else "")
            )
        return {name: value for name, value in values.items() if name in told or not math.isnan(value)}

    def validate(self, agreement: Agreement) -> dict[str, Score]:
        """The score of each source, on ``validation_batches`` batches, and of each kind of probe, as this step has it,
        over all ranks. Incomplete, and to be ignored, if a signal arrives meanwhile.
        """
        model = self.accelerator.unwrap_model(self.objective).model
        steps = ((step, split) for split, count in self._validated().items() for step in range(count))
        batches = chain.from_iterable(self.feed.batches(*step) for step in steps)
        batches = takewhile(lambda _: not agreement.number, batches)
        with self.accelerator.autocast():
            names, device = [*self.mixture.sources, *self.mixture.probe_names], self.accelerator.device
            scores = score(model, batches, names, self.token_bytes, device, self.feed.stretches)
        if self.accelerator.num_processes > 1:
            # Objects, because ranks may have different sources and metrics.
            ranks = gather_object([scores])
            scores = {name: sum((of_rank[name] for of_rank in ranks), Score()) for name in scores}
        return {name: of for name, of in scores.items() if of.rows}

    def _validation_figures(self, scores: dict[str, Score]) -> dict[str, float]:
        figures = {}
        for name, s in scores.items():
            figures |= {f"validation/{name}/loss": s.loss, f"validation/{name}/accuracy": s.accuracy}
            if name in self.texts:
                figures[f"validation/{name}/bits_per_byte"] = s.bits_per_byte
            figures |= {f"validation/{name}/{metric}": value for metric, value in s.metrics.items()}
        return figures

    def _save(self, figures: dict[str, Tensor], tracker: Tracker | None) -> None:
        """Save a checkpoint if its last loss and gradients were finite, or left out."""
        if not self.guard.bad:
            self._read(figures)
        self.accelerator.wait_for_everyone()
        if tracker:
            tracker.sync()
        # It is in parts if processes share parameters.
        of_optimizers = [] if self.saver else [optimizer.state_dict() for optimizer in self.optimizers]
        state: dict[str, Any] = {"step": self.step, "trained": self.trained, "optimizers": of_optimizers}
        if self.guard.judges:
            state["recent_losses"] = [*self.guard.recent]
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        if self.feed.carried:
            state["carried"] = self.feed.carried.saved(self.accelerator.num_processes)
        beside = checkpoint.Beside(self.tokenizer, state, self._record().texts())
        if self.saver:
            self.saver.save(self.run_dir, self.step, beside, self.settings.keep)
        elif tracker:
            model = self.accelerator.unwrap_model(self.objective).model
            checkpoint.save(self.run_dir, self.step, model, beside, self.settings.keep, self.ema)
        self.accelerator.wait_for_everyone()

    def _make_whole(self) -> None:
        """Add whole weights to the last checkpoint of a complete run."""
        last = checkpoint.latest(self.run_dir)
        if self.accelerator.is_main_process and files.in_parts_alone(last):
            consolidate(last)

    def _record(self) -> resume.Record:
        facts = {
            "step": self.step,
            "processes": self.accelerator.num_processes,
            "batch_size": self.settings.batch_size,
            "forwards": self.feed.forwards,
            "parameters": count_parameters(self.model),
            "trained_parameters": count_parameters(self.model, trained=True),
            "device": self.accelerator.device.type,
            "precision": self.accelerator.mixed_precision,
            "memlm": memlm.__version__,
            "torch": torch.__version__,
        }
        return resume.Record(self.config, self.mixture.manifests, facts)

    def _any(self, flag: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device)).item())

    def tokens_per_step(self) -> int:
        return self.mixture.batch_size * self.config["data"]["seq_len"]

    @cached_property
    def flops(self) -> dict[int, float] | None:
        """FLOPs of a token's forward in rows of each length; None for a backbone, and where nothing is logged."""
        if not isinstance(self.model, MemLMForCausalLM) or not self.accelerator.is_main_process:
            return None
        lengths = self.feed.lengths.stages.steps(self.settings.steps)
        return {length: count_flops(self.model.config, length) for length in lengths}
