"""The training loop: the same on one process and on many, with Ray or without.

A `Trainer` owns the model, the optimizer and the loaders of one rank, and tells a `Listener` what it does. Randomness
is a pure function of (seed, step, rank), so that a resumed training continues to the bit, within an epoch too; on GPUs,
where the default algorithms differ in the last bits from time to time, with `train.deterministic`. All ranks compare
their losses: one that is not finite stops all before a weight changes. Rank 0 writes checkpoints.
"""

from __future__ import annotations

import inspect
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from slrnet.checkpoints.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointWriter,
    TrainState,
    check_classes,
    load_checkpoint,
    load_whole,
    not_finite,
)
from slrnet.checkpoints.run_store import STATE, on_this_machine, validation_scores
from slrnet.config import Config
from slrnet.data.batch import Batch, EvalSample
from slrnet.data.eval_loader import EvalLoader
from slrnet.data.manifest import ShardSet
from slrnet.data.readers import read_ahead, share_of
from slrnet.data.samples import SkippedSample
from slrnet.data.supervision import supervision_of
from slrnet.data.train_loader import TrainLoader
from slrnet.distributed.process import Process, gather_over_ranks, share_buffers, sum_over_ranks
from slrnet.evaluation.masks import (
    PseudoMask,
    evaluate_masks,
    measure_pseudo_masks,
    pseudo_mask_subset,
    quality_metrics,
)
from slrnet.inference.forward import Inference
from slrnet.models.global_norm import GlobalBatchNorm2d, share_batch_norms
from slrnet.models.network import Network, autocast_dtype, mixed_precision
from slrnet.models.slrnet import build_network
from slrnet.ops.compiled import compile_regions
from slrnet.storage.files import sha256_of
from slrnet.tracking.protocol import metric_key
from slrnet.training.listener import Listener, loss_key
from slrnet.training.optim import WeightAverage, build_optimizer, clip_gradients, rate_factor, set_rate
from slrnet.training.requests import Requests, Wish
from slrnet.training.step import find_pseudo_rows, step_generator, step_losses

__all__ = ["NonFiniteLossError", "Trainer", "check_batch"]

_REMEDY = "Lower optim.lr, or train with train.precision=fp32"
LOSS_SCALE = "loss_scale"
"""Where float16's loss scale is in checkpoints, beside the optimizer's state, and among a step's figures."""
SMALLEST_SCALE = 1.0
"""Loss scale below which a training stops: from the first one, 65,536, after 17 steps in a row that overflow."""


class NonFiniteLossError(ArithmeticError):
    """A loss, a gradient or a weight became infinite or NaN."""


class _StoppedError(Exception):
    """Ends `Trainer.fit` early."""


@dataclass(eq=False)
class Trainer:
    """Trains one run on one rank."""

    config: Config
    shards: ShardSet
    _: KW_ONLY
    process: Process
    folder: Path
    """The run's folder; checkpoints go to `checkpoints`."""
    listener: Listener = field(default_factory=Listener)
    """Hears what the training does."""
    upload: Callable[[], None] | None = None
    """Copies the folder to the run's storage after each checkpoint; None if the folder is the storage."""

    def __post_init__(self) -> None:
        config, shards, process = self.config, self.shards, self.process
        self.writer = CheckpointWriter(self.folder / "checkpoints", config, upload=self.upload)
        self.model, self.wrapped = _new_network(config, shards.info.num_classes, process, self.listener)
        self.average = WeightAverage(self.model, config.train.ema) if config.train.ema else None
        on_gpu = process.device.type == "cuda"
        self.optimizer = build_optimizer(self.model, config.optim, batch_size=config.train.batch_size, fused=on_gpu)
        half = autocast_dtype(config.train.precision, process.device) == torch.float16
        self.scaler = torch.amp.GradScaler(process.device.type, enabled=half)
        self.supervision = supervision_of(config, shards)
        self.loader = TrainLoader(
            shards,
            config.data,
            self.supervision,
            batch_size=config.train.batch_size,
            seed=config.train.seed,
            rank=process.rank,
            world_size=process.world_size,
            pin_memory=on_gpu,
        )
        self._requests, self._last_save = Requests(), time.monotonic()
        self._agreed: Wish = ""
        self._stopping = False
        self.state = TrainState(
            epoch=0,
            step=0,
            classes=shards.info.classes,
            palette=shards.info.palette,
            data_fingerprint=shards.info.fingerprint,
            world_size=process.world_size,
            depth=shards.info.depth,
        )

    @property
    def evaluated(self) -> Network:
        """The network that is measured and saved: the weights' average if there is one, else the one that trains."""
        return self.model if self.average is None else self.average.model

    @property
    def labeler(self) -> Network | None:
        """The network that makes pseudo labels; None: the training pass."""
        source = self.config.calibration.source
        return None if source == "training" else self.model if source == "evaluation" else self.evaluated

    def resume(self, fetch: Callable[[str], None] = lambda name: None) -> bool:
        """Continues from the run's last whole checkpoint, if it has one: the one that rank 0 finds, on all ranks.

        Rates, momentum and decay are those of the configuration. With another number of ranks the training continues
        correctly, but not to the bit. `fetch` brings the checkpoint of that name to this machine where it is missing.

        Raises:
            CheckpointError: the checkpoint has other classes, other data, or another network, or a rank cannot read it
                or reads another one.
        """
        folder, process = self.folder / "checkpoints", self.process
        checkpoint: Checkpoint | None = None
        problem: Exception | None = None
        try:
            checkpoint = load_whole(folder) if process.is_main else None
        except (ValueError, OSError) as error:
            problem = error
        name = "" if checkpoint is None else checkpoint.path.name
        name, refused = gather_over_ranks((name, str(problem or "")), process)[0]
        if refused:
            raise problem or CheckpointError(f"rank 0 cannot continue the run: {refused}")
        if not name:
            return False
        digest = ""
        try:
            if not process.is_main:
                fetch(name)
            self._restore(checkpoint or load_checkpoint(folder / name))
            digest = sha256_of(folder / name / STATE)
        except (ValueError, OSError) as error:
            problem = error
        found = gather_over_ranks((str(problem or ""), self.state.step, digest), process)
        if problem is not None:
            raise problem
        for rank, (failure, step, _) in enumerate(found):
            if found[rank] != found[0]:
                reason = found[0][0] or failure or f"it is another one, of step {step}"
                raise CheckpointError(
                    f"rank {rank} cannot continue with rank 0 from {name}: {reason}; all nodes must see one run folder"
                )
        return True

    def _restore(self, checkpoint: Checkpoint) -> None:
        saved, data, location = checkpoint.state, self.state.data_fingerprint, self.shards.location
        check_classes(saved, self.state.classes, data=location)
        if saved.data_fingerprint != data:
            raise CheckpointError(
                f"{checkpoint.path} was trained on other data (fingerprint {saved.data_fingerprint[:12]}) than is in "
                f"{location} ({data[:12]}); resume with the same shards, or start a new run"
            )
        earlier, name = checkpoint.config.optim.name, self.config.optim.name
        if earlier != name:
            raise CheckpointError(
                f"{checkpoint.path} was trained with optim.name={earlier}, whose state {name} cannot continue; resume "
                f"with optim.name={earlier}, or start a new run"
            )
        groups = self.optimizer.param_groups
        settings = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        try:
            self.model.load_state_dict(checkpoint.model if checkpoint.trained is None else checkpoint.trained)
            if self.average is not None:
                self.average.model.load_state_dict(checkpoint.model)
            self.optimizer.load_state_dict(checkpoint.optimizer)
            if LOSS_SCALE in checkpoint.optimizer:
                self.scaler.load_state_dict(checkpoint.optimizer[LOSS_SCALE])
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"{checkpoint.path} does not fit the network that the settings describe ({reason}); resume without "
                "--set of model.* and cvlr.* fields and of optim.layer_decay, or start a new run"
            ) from None
        for group, values in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(values)
        self.state = replace(saved, world_size=self.process.world_size, palette=self.state.palette)

    def _take_weights(self, checkpoint: Checkpoint) -> None:
        """Starts from the weights of another run, whose network is the same; the steps begin at 0."""
        self.model.load_state_dict(checkpoint.model)
        if self.average is not None:
            self.average.model.load_state_dict(checkpoint.model)

    def fit(
        self,
        *,
        report: Callable[[Mapping[str, float]], None],
        notice: Callable[[], str] = lambda: "",
        requests: Requests | None = None,
        until: int | None = None,
    ) -> TrainState:
        """Trains to the last epoch, or until it is asked to stop; returns the final state.

        Args:
            report: called on every rank after each epoch, with its figures and, as `epoch`, its number from 1.
            notice: called on every rank at each logged step; says why the training may be stopped soon, the same on
                all ranks, or "". While it says something, each such step ends with a checkpoint.
            requests: checkpoints that others ask for.
            until: stops after this many epochs; the schedule remains that of all of them.

        Raises:
            NonFiniteLossError: names step, rank and loss parts.
            DataError: a shard is damaged and `data.on_error` is "stop".
            CheckpointError: a checkpoint could not be written.
        """
        epochs, every = self.config.train.epochs, self.config.evaluation.every
        self._requests, self._last_save = requests or Requests(), time.monotonic()
        try:
            if self.config.train.init and not self.state.step:
                self._take_weights(load_checkpoint(on_this_machine(self.config.train.init)))
            self.listener.start(self.state, total=epochs * self.loader.steps_per_epoch)
            for epoch in range(self.state.epoch, epochs if until is None else min(until, epochs)):
                metrics = self._train_epoch(epoch, notice)
                if (epoch + 1) % every == 0 or epoch + 1 == epochs:
                    metrics |= self._measure(epoch)
                self._finish_epoch(epoch, metrics)
                report(metrics | {"epoch": epoch + 1})
            self.writer.wait()
        except _StoppedError:
            pass  # the checkpoint is written
        finally:
            self.writer.close()
            self.listener.close()
            self.loader.close()
        return self.state

    def try_steps(self, steps: int) -> Iterator[float]:
        """Takes up to `steps` optimizer steps with pseudo labels, for measurements: nothing is logged or saved.

        Yields:
            Seconds of each step, without the wait for its batch.
        """
        self._begin_steps()
        try:
            for step, batch in zip(range(steps), self.loader.epoch(0), strict=False):
                begun = time.perf_counter()
                self._set_rate(step)
                self._step(batch, step, pretraining=False)
                yield time.perf_counter() - begun
        finally:
            self.loader.close()

    def _train_epoch(self, epoch: int, notice: Callable[[], str]) -> dict[str, float]:
        self._begin_steps()
        self.listener.begin()
        settings = self.config.train
        sums, waited = defaultdict(float, self.state.unfinished), 0.0
        started = time.perf_counter()
        first, end = self.state.step, (epoch + 1) * self.loader.steps_per_epoch
        batches = self.loader.epoch(epoch, first - epoch * self.loader.steps_per_epoch)
        for step in range(first, end):
            begun = time.perf_counter()
            self.listener.at("waiting for data", step)
            batch = next(batches)
            wait = time.perf_counter() - begun
            rate = self._set_rate(step)
            parts = self._step(batch, step, pretraining=epoch < settings.pretrain_epochs)
            asked = self._agreed
            waited += wait
            for name, value in parts.items():
                sums[name] += value
            done, seconds = step + 1, time.perf_counter() - begun
            self.listener.step(done, parts, rate=rate, waited=wait, seconds=seconds)
            warning = notice() if done % settings.log_every == 0 else ""
            due = warning or asked or (settings.checkpoint_every and done % settings.checkpoint_every == 0)
            if due and (done < end or asked):  # the epoch saves at its end
                self._save_within_epoch(done, sums, warning)
            if asked == "stop" or (asked and self._requests.asked()):  # a checkpoint by time is not waited for
                self._answer(stop=asked == "stop")
        self.state = replace(self.state, step=end, metrics={}, unfinished=dict(sums))
        if next(batches, None) is not None:  # here the loader compares what it read with its plan
            raise AssertionError("the loader gave more batches than it planned")
        _note_skipped(self.listener, self.loader.skipped, epoch)
        self.listener.at("summing up the epoch", self.state.step)
        own = torch.tensor([waited, time.perf_counter() - started, len(self.loader.skipped)], dtype=torch.float64)
        images = settings.batch_size * (end - first)
        # The losses are those of all ranks and of the whole epoch; the clock knows the steps that were taken here.
        metrics = {loss_key(name, "epoch_"): value / self.loader.steps_per_epoch for name, value in sums.items()}
        waited, seconds, skipped = sum_over_ranks(own, self.process).tolist()
        metrics |= {
            "speed/images_per_second": images * self.process.world_size / seconds,
            "speed/data_wait_fraction": waited / seconds,
            "speed/skipped_samples": skipped,
        }
        self.listener.end(step=end, images=(end - first) * self.loader.share)
        self._check_weights(end)
        return metrics

    def _begin_steps(self) -> None:
        self.wrapped.train()
        # cuDNN times its algorithms at a size's first use, which pays where sizes repeat.
        torch.backends.cudnn.benchmark = not self.config.train.deterministic

    def _check_weights(self, done: int) -> None:
        """Raises a `NonFiniteLossError` that names the layer, if the last of `done` steps spoiled a weight."""
        if name := not_finite(self.model.state_dict()):
            raise NonFiniteLossError(
                f"step {done - 1} left values that are not finite in {name}; {_REMEDY}, and continue with --resume "
                "from the last checkpoint, which is from before"
            )

    def _save_within_epoch(self, done: int, sums: Mapping[str, float], warning: str) -> None:
        self._check_weights(done)
        self.state = replace(self.state, step=done, metrics={}, unfinished=dict(sums))
        self._save()
        if warning:
            self.writer.wait()
            self.listener.notice(warning, step=done)

    def _answer(self, *, stop: bool) -> None:
        """Waits for the checkpoint that was asked for, says that it is written, and ends the training if asked to."""
        self.writer.wait()
        self._requests.saved(self.state.step)
        if stop:
            raise _StoppedError

    def _wish(self) -> list[float]:
        """What this rank wants: a checkpoint as one was asked for or the last one is old, and the end."""
        asked, minutes = self._requests.asked(), self.config.train.checkpoint_minutes
        old = self.process.is_main and minutes and time.monotonic() - self._last_save > 60 * minutes
        return [float(asked == "save" or bool(old)), float(asked == "stop")]

    def _save_while_measuring(self) -> None:
        """Rank 0 saves at once what it is asked for; ranks meet at the end of measuring, so alone it also stops."""
        asked = self._requests.asked()
        if asked and not self._stopping:
            self._stopping = asked == "stop"
            self._write()
            self._answer(stop=asked == "stop" and self.process.world_size == 1)

    def _save(self) -> None:
        self.listener.at("saving", self.state.step)
        self._write()

    def _write(self) -> None:
        self._last_save = time.monotonic()
        if self.process.is_main:
            state = self.listener.checkpoint(self.state)
            optimizer = self.optimizer.state_dict()
            if self.scaler.is_enabled():
                optimizer[LOSS_SCALE] = self.scaler.state_dict()
            trained = None if self.average is None else self.model.state_dict()
            self.writer.save(state, model=self.evaluated.state_dict(), optimizer=optimizer, trained=trained)

    def _step(self, batch: Batch, step: int, *, pretraining: bool) -> dict[str, float]:
        """One optimizer step; returns the loss and its parts, averaged over accumulation steps and ranks."""
        settings, count = self.config.train, self.config.train.accumulation
        # Parts of ranks and steps count by their images: the gradient is that of the global batch's mean.
        scale = self.process.world_size / settings.batch_size
        first = share_of(settings.batch_size, rank=self.process.rank, world_size=self.process.world_size).start
        share = self._pixel_labeled_share(batch)
        self.optimizer.zero_grad(set_to_none=True)
        totals: dict[str, Tensor] = {}
        for index in range(count):
            rows = slice(len(batch.keys) * index // count, len(batch.keys) * (index + 1) // count)
            part = batch.part(rows)
            weight = len(part.keys) * scale
            # Views belong to the images of the global batch; dropout and gates are this rank's own.
            generator = step_generator(settings.seed, step, 0, 0)
            start = int(torch.randint(2**62, (), generator=generator))
            torch.manual_seed(start + self.process.rank * count + index)
            # Only the last part's backward pass averages the gradients over the ranks.
            alone = index + 1 < count and isinstance(self.wrapped, DistributedDataParallel)
            with self.wrapped.no_sync() if alone else nullcontext():  # type: ignore[operator]
                self.listener.at("going forward", step)
                place: dict[str, Any] = {"first": first + rows.start, "pixel_labeled_share": share}
                losses = self._losses(part, generator, pretraining=pretraining, **place)
                self.listener.at("going backward", step)
                with record_function("slrnet: backward"):
                    self.scaler.scale(losses["loss"] * weight).backward()
            for name, value in losses.items():
                totals[name] = totals.get(name, torch.zeros((), device=value.device)) + value.detach() * weight
        self.listener.at("comparing losses", step)
        return self._update(totals, step)

    def _update(self, totals: dict[str, Tensor], step: int) -> dict[str, float]:
        """The optimizer's step, and the averages of the loss parts; a loss that is not finite changes no weight."""
        if self.scaler.is_enabled():
            totals[LOSS_SCALE] = self.scaler.scale(torch.ones((), device=self.process.device))
        with record_function("slrnet: agreement"):
            gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
            # The scaler leaves out a step whose gradients overflow in float16.
            largest = torch.stack(torch._foreach_norm(gradients, math.inf)).max()
            extent = torch.zeros_like(largest) if self.scaler.is_enabled() else largest
            summed = _sum_over_ranks(totals, extent, self._wish(), self.process)
        if self.config.optim.clip_norm:
            self.scaler.unscale_(self.optimizer)
            clip_gradients(self.model.parameters(), largest=self.config.optim.clip_norm)
        if self.optimizer.defaults["fused"] and not self.scaler.is_enabled():
            with record_function("slrnet: optimizer"):
                self.optimizer.found_inf = summed[-self.process.world_size :].sum().float()  # type: ignore[attr-defined]
                self.optimizer.step()
            # Here the host waits, with all work under way.
            values, (save, stop) = _averages(totals, summed, self.process, step, self.model)
        else:
            values, (save, stop) = _averages(totals, summed, self.process, step, self.model)
            with record_function("slrnet: optimizer"):
                self.scaler.step(self.optimizer)
                self.scaler.update()
        self._agreed = "stop" if stop else "save" if save else ""
        if self.average is not None or self.labeler is not None:  # they read buffers, which differ between ranks
            share_buffers(self.model, self.process)
        if self.average is not None:
            self.average.update(self.model, step + 1)
        return values

    def _pixel_labeled_share(self, batch: Batch) -> Tensor | None:
        """Share of the images with true masks in the global batch; None if it is not needed."""
        if not self.config.weights.pixel_mean:
            return None
        own = batch.has_pixel_labels.sum().to(self.process.device, non_blocking=True)
        return sum_over_ranks(own, self.process) / self.config.train.batch_size

    def _losses(
        self, batch: Batch, generator: torch.Generator, *, pretraining: bool, **place: Any
    ) -> dict[str, Tensor]:
        with mixed_precision(self.config.train.precision, self.process.device):
            result = step_losses(
                self.wrapped,
                batch.to(self.process.device, non_blocking=True),
                config=self.config,
                encoder=self.model.encoder,
                labeler=self.labeler,
                generator=generator,
                pseudo_rows=None if pretraining else find_pseudo_rows(batch),
                **place,
            )
        return {"loss": result.total, **result.parts, **result.figures}

    def _set_rate(self, step: int) -> float:
        """Sets the rates of a step; returns the first group's."""
        settings, steps = self.config.train, self.loader.steps_per_epoch
        first = settings.pretrain_epochs
        last = first + settings.cosine_epochs if settings.cosine_epochs else settings.epochs
        warmup = self.config.optim.warmup_steps
        factor = rate_factor(step, pretrain_steps=first * steps, total_steps=last * steps, warmup_steps=warmup)
        set_rate(self.optimizer, factor)
        return float(self.optimizer.param_groups[0]["lr"])

    def _measure(self, epoch: int) -> dict[str, float]:
        """Pseudo-mask quality and validation after an epoch; every rank takes part."""
        network = self.evaluated.eval()
        share_buffers(network, self.process)
        inference = Inference(network, self.config)
        torch.backends.cudnn.benchmark = False  # images have all sizes
        # As it is: compiled code is for the sizes of training.
        with torch.compiler.set_stance("force_eager") if self.config.train.compile else nullcontext():
            metrics = self._measure_pseudo_masks(inference, epoch)
            self.listener.notice(f"epoch {epoch + 1}: validating")
            samples = self._samples(epoch, self.config.data.val_split)
            quality = evaluate_masks(inference, samples, process=self.process)
        values = quality_metrics("val", quality, self.shards.info.classes)
        metrics[metric_key("val", f"miou_{quality.protocol}")] = values.pop("val/miou", math.nan)
        return metrics | values | {"val/images": quality.images}

    def _measure_pseudo_masks(self, inference: Inference, epoch: int) -> dict[str, float]:
        """On this rank's share of the fixed subset of training images; the first ones of the subset are drawn."""
        split = self.shards.split(self.config.data.train_split)
        chosen = pseudo_mask_subset(split, self.supervision, self.config)
        drawn = [split.key(index) for index in chosen[: self.config.evaluation.panel_images]]
        if not chosen:
            return {}

        def show(masks: PseudoMask) -> None:
            if masks.sample.key in drawn:
                self.listener.measured(masks, epoch)

        self.listener.notice(f"epoch {epoch + 1}: measuring pseudo masks")
        samples = self._samples(epoch, self.config.data.train_split, chosen)
        dense, kept = measure_pseudo_masks(inference, samples, process=self.process, show=show)
        return quality_metrics("pseudo_mask", dense, self.shards.info.classes) | {
            "pseudo_mask/coverage": kept.matrix.coverage(),
            "pseudo_mask/kept_fdr": kept.matrix.mfdr(),
            "pseudo_mask/images": dense.images,
        }

    def _samples(self, epoch: int, split: str, indices: tuple[int, ...] | None = None) -> Iterator[EvalSample]:
        """This rank's share of a split's images, or of some of them."""
        self.listener.at("measuring", self.state.step)
        share: dict[str, Any] = {"rank": self.process.rank, "world_size": self.process.world_size}
        samples = EvalLoader(self.shards, split=split, indices=indices, **share, on_error=self.config.data.on_error)
        for sample in read_ahead(samples):
            yield sample
            self._save_while_measuring()
            self.listener.at("measuring", self.state.step)
        self.listener.at("adding up what was measured", self.state.step)
        _note_skipped(self.listener, samples.skipped, epoch)

    def _finish_epoch(self, epoch: int, metrics: dict[str, float]) -> None:
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        scores = validation_scores(finite)
        scores += [] if self.state.best_score is None else [self.state.best_score]
        self.state = replace(
            self.state,
            epoch=epoch + 1,
            step=(epoch + 1) * self.loader.steps_per_epoch,
            best_score=max(scores, default=None),
            metrics=finite,
            unfinished={},
        )
        self.listener.epoch(self.state, metrics)
        self._save()


def _note_skipped(listener: Listener, skipped: tuple[SkippedSample, ...], epoch: int) -> None:
    for sample in skipped[:5]:
        listener.notice(f"epoch {epoch + 1}: skipped {sample.key} of {sample.shard}: {sample.reason}")
    if len(skipped) > 5:
        listener.notice(f"epoch {epoch + 1}: skipped {len(skipped) - 5} more")


def _sum_over_ranks(totals: dict[str, Tensor], gradient: Tensor, wishes: list[float], process: Process) -> Tensor:
    """Sums loss parts and wishes over the ranks in one all-reduce, with a flag per rank for what is not finite.

    `gradient` is the largest one of this rank's model.
    """
    own = torch.stack(list(totals.values())).double()
    told = torch.tensor(wishes, dtype=torch.float64).to(own.device, non_blocking=True)
    flags = torch.zeros(process.world_size, dtype=torch.float64, device=own.device)
    # 2: a loss, whose gradient all ranks get; 1: a gradient alone.
    flags[process.rank] = torch.maximum(2.0 * (~own.isfinite()).any(), (~gradient.isfinite()).double())
    return sum_over_ranks(torch.cat([own.nan_to_num(0.0, 0.0, 0.0), told, flags]), process)


def _averages(
    totals: dict[str, Tensor], summed: Tensor, process: Process, step: int, model: torch.nn.Module
) -> tuple[dict[str, float], list[float]]:
    """The averages and the wishes, from `_sum_over_ranks`; stops all ranks if anything is not finite."""
    shared = summed.cpu().tolist()
    told, found = shared[len(totals) : -process.world_size], shared[-process.world_size :]
    if worst := max(found):
        wrong = found.index(worst)
        listed = ", ".join(f"{name} {float(value):g}" for name, value in totals.items())
        what = "loss" if worst > 1 else "gradient"
        if name := not_finite(dict(model.state_dict())):
            cause = f"; {name} is not finite since step {step - 1}"
        elif name := not_finite({name: p.grad for name, p in model.named_parameters() if p.grad is not None}):
            cause = f"; the gradient of {name} is not finite"
        else:
            cause = ""
        # Batch norms over all ranks hand on what is not finite.
        where = "all ranks" if min(found) == worst and process.world_size > 1 else f"rank {wrong}"
        raise NonFiniteLossError(
            f"step {step}: the {what} is not finite on {where} (rank {process.rank} has {listed}{cause}); "
            f"this step changed no weight. {_REMEDY}, and continue with --resume"
        )
    values = {name: value / process.world_size for name, value in zip(totals, shared, strict=False)}
    if values.get(LOSS_SCALE, SMALLEST_SCALE) < SMALLEST_SCALE:
        raise NonFiniteLossError(
            f"step {step}: gradients are not finite in float16 even at a loss scale below {SMALLEST_SCALE:g}; the last "
            f"steps changed no weight. {_REMEDY}, and continue with --resume"
        )
    return values, told


def check_batch(config: Config, world_size: int) -> None:
    """Raises a `ValueError` for a global batch that leaves a rank without an image in some backward pass."""
    batch, accumulation = config.train.batch_size, config.train.accumulation
    if batch // world_size < accumulation:
        raise ValueError(
            f"train.batch_size {batch} is too small for {world_size} workers times {accumulation} accumulation "
            f"steps; use {world_size * accumulation} or more, or fewer workers"
        )


def _without_global_norms(regions: list[torch.nn.Module]) -> list[torch.nn.Module]:
    """The regions whose norms measure this worker's images alone: the compiler would stop at each other one."""
    return [part for part in regions if not any(isinstance(one, GlobalBatchNorm2d) for one in part.modules())]


def _new_network(
    config: Config, num_classes: int, process: Process, listener: Listener
) -> tuple[Network, torch.nn.Module]:
    """The network of a run, and the same wrapped for distributed training."""
    torch.manual_seed(config.train.seed)
    model, device = build_network(config, num_classes=num_classes), process.device
    if device.type == "cpu":
        from slrnet.cpu import speed_up
        from slrnet.cpu.allocator import spare_memory

        spare_memory(speed_up(model))
    dtype = torch.float64 if config.train.precision == "fp64" else torch.float32
    model.to(device=device, dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.model.sync_batch_norm and process.world_size > 1:
        share_batch_norms(model.train(), lambda: listener.meet())
    if config.train.compile:
        compile_regions(_without_global_norms(model.regions()), device)
    if process.world_size == 1:
        return model, model
    # Every parameter takes part in every step: a label type that a rank's batch lacks leaves zeros with a graph. DDP
    # shares no buffers: the ranks do so after steps whose buffers are read, and before the network is measured.
    known = inspect.signature(DistributedDataParallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {"gradient_as_bucket_view": True, sync: False}
    wrapped = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None, **options)
    if config.train.exchange == "bf16":
        wrapped.register_comm_hook(None, bf16_compress_hook)
    return model, wrapped
