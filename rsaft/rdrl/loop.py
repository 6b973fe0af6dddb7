"""The training loop: draw, step, reduce, guard, clip, update, log, evaluate, save.

A run can be stopped, killed and resumed at any moment, and split over any number of processes, without changing its
result: every draw is keyed by (seed, step, sample id), and nothing else is random.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rsaft import distributed
from rsaft.backbones.export import export_weights
from rsaft.backbones.pipeline import DiffusersBackbone
from rsaft.errors import CheckpointError, ConfigError, NonFiniteError
from rsaft.flatten.rsa_ft import KeptEps
from rsaft.metrics.evaluate import Measure, evaluate, joined
from rsaft.metrics.report import write_report
from rsaft.prompts import read_prompts
from rsaft.randomness import prompt_rows
from rsaft.rdrl.checkpoint import list_checkpoints, load_latest, save_checkpoint
from rsaft.rdrl.model_card import write_model_card
from rsaft.rdrl.optimization import Optimization, load_weights
from rsaft.rdrl.progress import ProgressLine
from rsaft.rdrl.run_directory import locked
from rsaft.rdrl.run_files import RunFiles, Trackers
from rsaft.rdrl.score import ImageScore, plain_step
from rsaft.rdrl.signals import StopRequest
from rsaft.rdrl.train_config import TrainConfig
from rsaft.types import Algorithm, Batch, Objective, Reward, Step, StepOutput


@dataclass(frozen=True)
class RunResult:
    """What `Trainer.fit` leaves behind."""

    run_dir: Path
    step: int  # updates done
    best_step: int  # evaluation with the best mean held-out reward (train reward, if nothing is held out)
    evaluations: tuple[dict[str, float], ...]  # means of each evaluation, with its "step"
    checkpoints: tuple[Path, ...]
    signal: int | None = None  # the signal that stopped the run, if one did


class Trainer:
    """Fine-tunes a backbone. `fit` may be called again with `resume=True` after a stop, a kill or a crash."""

    def __init__(
        self,
        backbone: DiffusersBackbone,
        *,
        algorithm: Algorithm,
        rewards: Mapping[str, Reward],
        objective: Objective,
        step: Step = plain_step,
        prompts: Sequence[str] | str | os.PathLike[str],
        eval_prompts: Sequence[str] | str | os.PathLike[str] | None = None,
        held_out: Mapping[str, Reward] | None = None,
        measures: Mapping[str, Measure] | None = None,
        config: TrainConfig | None = None,
        run_dir: str | os.PathLike[str] | None = None,
        description: str | None = None,
    ) -> None:
        """Set up a run; nothing is written before `fit`.

        Args:
            backbone: what is trained, in place.
            algorithm: how trajectories are sampled and where they carry gradient.
            rewards: what is trained on, by name.
            objective: from rewards to a loss.
            step: how gradients are taken: `plain_step` or `rsaft.flatten.RSAFT`.
            prompts: training prompts, or a file of them.
            eval_prompts: prompts of the evaluations; the training prompts by default.
            held_out: rewards that evaluations report and nothing is trained on.
            measures: named scores with parts that evaluations report.
            config: settings of the loop.
            run_dir: folder of the run; the first free runs/run-N by default.
            description: text of the run directory's config.yaml.

        Raises:
            ConfigError: if the settings do not fit together.
        """
        self.backbone = backbone
        self.algorithm = algorithm
        self.config = config or TrainConfig()
        self.rewards, self.held_out, self.measures = dict(rewards), dict(held_out or {}), dict(measures or {})
        if not self.rewards:
            raise ConfigError("rewards: there is none to train on; name at least one.")
        self.step = step
        self.prompts = _prompt_list(prompts)
        self.eval_prompts = self.prompts if eval_prompts is None else _prompt_list(eval_prompts)
        self.score = ImageScore(backbone, self.rewards, objective)
        distributed.join(backbone.device)
        # Every rank names the first rank's folder, which another rank may already have made.
        self.run_dir = Path(run_dir) if run_dir is not None else distributed.gathered(_free_run_dir())[0]
        self._description = description
        self._micro_batches = _split(self.config, distributed.world_size(), distributed.rank())
        c = self.config
        self.optimization = Optimization(
            backbone.parameters(),
            lr=c.lr,
            betas=c.betas,
            weight_decay=c.weight_decay,
            lr_schedule=c.lr_schedule,
            warmup_steps=c.warmup_steps,
            steps=c.steps,
            ema=c.ema,
        )
        self._step_state: Any = None
        self._nonfinite_in_a_row = 0
        self._evaluations: list[dict[str, float]] = []

    def fit(self, resume: bool = False) -> RunResult:
        """Train up to `config.steps` updates.

        Args:
            resume: go on from the newest good checkpoint of `run_dir` (from the start, if there is none yet).

        Raises:
            RunDirectoryError: if another process uses the run directory.
            CheckpointError: if no checkpoint is good, or the disk is full.
            NonFiniteError: if no update was possible for `max_nonfinite` steps in a row.
        """
        main = distributed.rank() == 0
        if main:
            self.run_dir.mkdir(parents=True, exist_ok=True)
        with locked(self.run_dir) if main else nullcontext(), StopRequest() as stop:
            done = self._restore() if resume else None
            files = RunFiles(self.run_dir, done, self._description, resume=resume) if main else None
            done = done or 0
            trackers = Trackers(self.config.trackers, self.run_dir)
            signal = None
            with ProgressLine(done=done, total=self.config.steps, visible=main, label=self.run_dir.name) as line:
                while True:
                    due = done % self.config.eval_every == 0 or done == self.config.steps
                    if due and not (self._evaluations and self._evaluations[-1]["step"] == done):
                        means = self._evaluate(done, files)
                        trackers.log(means, done)
                        line.evaluated(means)
                    signal = _agreed(stop.signal)
                    finished = done == self.config.steps
                    if done and (done % self.config.save_every == 0 or finished or signal is not None):
                        self._save(done, files)
                    if finished or signal is not None:
                        break
                    record = self._update(done, files)
                    done += 1
                    line.show(done, record)
                    trackers.log(record, done)
            trackers.close()
            result = self._result(done, signal)
            if files is not None:
                files.close()
                write_report([self.run_dir], self.run_dir / "report.html", title=self.run_dir.name)
                write_model_card(
                    self.run_dir,
                    source=self.backbone.source,
                    evaluations=self._evaluations,
                    step=done,
                    best=result.best_step,
                    is_lora=self.backbone.lora is not None,
                )
            distributed.barrier()
        return result

    def _update(self, done: int, files: RunFiles | None) -> dict[str, Any]:
        """One update of the weights, from prompts to the optimizer; its record."""
        begun = time.monotonic()
        c = self.config
        rows = prompt_rows(len(self.prompts), seed=c.seed, step=done, batch_size=c.batch_size)
        rollouts = [
            self.algorithm.rollout(
                self.backbone, Batch(tuple(self.prompts[rows[i]] for i in ids), tuple(ids), step=done, seed=c.seed)
            )
            for ids in self._micro_batches
        ]
        self.optimization.clear()
        output = self.step(rollouts, self.score, self.optimization.params, self._step_state)
        record, share = self._record(output, done + 1)
        gradients = self.optimization.gradients()
        distributed.sum_(gradients)
        for g in gradients:  # the mean over ranks, and over the samples that were not masked
            g.mul_(1 / (distributed.world_size() * share) if share else 0.0)
        lr = self.optimization.lr
        # With every sample masked there is no gradient; AdamW would still move the weights by its momentum.
        norm = self.optimization.update(max_grad_norm=c.max_grad_norm) if share else math.nan
        record |= {"grad_norm": norm, "lr": lr, "nonfinite/grad": int(not math.isfinite(norm))}
        if math.isfinite(norm):
            self._step_state = output.state
            self._nonfinite_in_a_row = 0
        else:
            self._nonfinite_in_a_row += 1
        if files is not None:
            files.metrics.write(record)
            files.timing.write({"step": done + 1, "seconds": time.monotonic() - begun})
        if self._nonfinite_in_a_row >= c.max_nonfinite:
            self._stop_nonfinite(output, rollouts, done)
        return record

    def _record(self, output: StepOutput, step: int) -> tuple[dict[str, Any], float]:
        """Means over the global batch, and the share of its samples that were not masked."""
        names = list(self.rewards)
        sums = torch.zeros(3 + len(names), dtype=torch.float64)
        for loss in output.losses:
            good = torch.where(loss.valid[:, None], loss.rewards, 0.0)
            sums[0] += len(loss.valid)
            sums[1] += int(loss.valid.sum())
            sums[2] += float(loss.value) * len(loss.valid)
            sums[3:] += good.sum(dim=0).double().cpu()
        logs = torch.tensor(list(output.logs.values()), dtype=torch.float64) / distributed.world_size()
        device = self.backbone.device if dist.is_initialized() and dist.get_backend() == "nccl" else "cpu"
        both = torch.cat([sums, logs]).to(device)
        distributed.sum_([both])
        total, valid, loss_sum, *rest = both.tolist()
        record: dict[str, Any] = {"kind": "train", "step": step, "loss": loss_sum / max(valid, 1)}
        record |= {f"reward/{name}": value / valid if valid else None for name, value in zip(names, rest, strict=False)}
        record |= {"nonfinite/reward": int(total - valid)}
        record |= dict(zip(output.logs, rest[len(names) :], strict=True))
        return record, valid / total

    def _stop_nonfinite(self, output: StepOutput, rollouts: Sequence[Any], done: int) -> None:
        values = torch.cat([loss.rewards for loss in output.losses])
        bad = [n for k, n in enumerate(self.rewards) if not bool(torch.isfinite(values[:, k]).all())]
        prompts = [p for r in rollouts for p in r.batch.prompts]
        raise NonFiniteError(
            f"step {done + 1}: no finite gradient for {self._nonfinite_in_a_row} updates in a row (rewards that are "
            f"not finite: {bad or 'none, so the gradient itself'}; first prompt '{prompts[0]}'); the weights are those "
            "of the last good update; lower the learning rate, or look at that reward."
        )

    def _evaluate(self, done: int, files: RunFiles | None) -> dict[str, float]:
        """Score fixed prompts and noises with the averaged weights; log, and save the grid."""
        c, world, rank = self.config, distributed.world_size(), distributed.rank()
        per = -(-c.eval_samples // world)
        with self.optimization.averaged():
            part = evaluate(
                self.backbone,
                self.eval_prompts,
                self.algorithm.sampling,
                seed=c.eval_seed,
                num_samples=c.eval_samples,
                batch_size=c.eval_batch,
                rewards=self.rewards,
                held_out=self.held_out,
                measures=self.measures,
                sharpness_rho=c.sharpness_rho,
                rows=slice(rank * per, (rank + 1) * per),
            )
        whole = joined(distributed.gathered(part))
        means = {"step": done} | whole.means()
        self._evaluations.append(means)
        if files is not None:
            files.evaluation(done, whole, means, grid=c.grid)
        return means

    def _save(self, done: int, files: RunFiles | None) -> None:
        """Write a checkpoint; only the first rank writes, all wait."""
        if files is not None:
            files.sync()
            tensors = self.optimization.tensors()
            state = self.optimization.state() | {
                "seed": self.config.seed,
                "batch_size": self.config.batch_size,
                "nonfinite_in_a_row": self._nonfinite_in_a_row,
                "evaluations": self._evaluations,
                "eps_age": None,
            }
            if isinstance(self._step_state, KeptEps):
                tensors["step"] = {str(i): e for i, e in enumerate(self._step_state.eps)}
                state["eps_age"] = self._step_state.age
            save_checkpoint(
                self.run_dir / "checkpoints",
                step=done,
                tensors=tensors,
                state=state,
                keep=self.config.keep,
                export=self._export,
            )
        distributed.barrier()

    def _export(self, folder: Path) -> None:
        with self.optimization.averaged():
            export_weights(self.backbone, folder)

    def _restore(self) -> int | None:
        """Load the newest good checkpoint; the number of updates it holds, None if there is no checkpoint."""
        found = load_latest(self.run_dir / "checkpoints")
        if found is None:
            return None
        if distributed.rank() == 0:
            for sentence in found.skipped:
                print(sentence)
        for name in ("seed", "batch_size"):
            if found.state[name] != getattr(self.config, name):
                raise CheckpointError(
                    f"{found.path}: the run began with train.{name} = {found.state[name]}, and now it is "
                    f"{getattr(self.config, name)}; set it back, or start a new run."
                )
        self.optimization.restore(found.tensors, found.state)
        if found.state["eps_age"] is not None:
            eps = [found.tensors["step"][str(i)].to(self.backbone.device) for i in range(len(found.tensors["step"]))]
            self._step_state = KeptEps(tuple(eps), found.state["eps_age"])
        self._nonfinite_in_a_row = found.state["nonfinite_in_a_row"]
        self._evaluations = list(found.state["evaluations"])
        return found.step

    def _result(self, done: int, signal: int | None) -> RunResult:
        checkpoints = tuple(list_checkpoints(self.run_dir / "checkpoints"))
        return RunResult(
            self.run_dir, done, best_step(self._evaluations), tuple(self._evaluations), checkpoints, signal
        )


def best_step(evaluations: Sequence[Mapping[str, float]]) -> int:
    """Step of the evaluation with the best mean held-out reward, or train reward if nothing is held out."""

    def mean_of(means: Mapping[str, float]) -> float:
        values = [v for k, v in means.items() if k.startswith("held_out/")]
        values = values or [v for k, v in means.items() if k.startswith("reward/")]
        return math.fsum(values) / len(values) if values else -math.inf

    return int(max(evaluations, key=mean_of)["step"]) if evaluations else 0


def load_trained(backbone: DiffusersBackbone, run_dir: Path) -> int:
    """Put the newest checkpoint's weights (its moving average, if it has one) into a backbone of the same settings.

    Returns:
        The number of updates that the checkpoint holds.

    Raises:
        CheckpointError: if there is no good checkpoint, or it is of another model.
    """
    found = load_latest(run_dir / "checkpoints")
    if found is None:
        raise CheckpointError(f"{run_dir}: there is no checkpoint yet; train it, or name another run.")
    load_weights(backbone.parameters(), found.tensors.get("ema", found.tensors["weights"]))
    return found.step


def _agreed(signal: int | None) -> int | None:
    """The largest signal that any rank received, so that all stop at the same step."""
    numbers = [s for s in distributed.gathered(signal) if s is not None]
    return max(numbers, default=None)


def _prompt_list(prompts: Sequence[str] | str | os.PathLike[str]) -> list[str]:
    if isinstance(prompts, str | os.PathLike):
        return list(read_prompts(Path(prompts)).prompts)
    if not prompts:
        raise ConfigError("prompts: the list is empty; give at least one prompt.")
    return list(prompts)


def _free_run_dir() -> Path:
    number = 1
    while (path := Path("runs") / f"run-{number}").exists():
        number += 1
    return path


def _split(config: TrainConfig, world: int, rank: int) -> list[range]:
    """Sample ids of this rank's micro-batches: equal parts, so that a mean of means is the mean."""
    size, per = config.batch_size, config.batch_size // world
    micro = config.micro_batch or per
    if size % world or per % micro:
        raise ConfigError(
            f"train.batch_size: {size} samples must split evenly over {world} processes and then into micro-batches of "
            f"{micro}; choose a multiple of {world * micro}."
        )
    return [range(first, first + micro) for first in range(rank * per, (rank + 1) * per, micro)]
