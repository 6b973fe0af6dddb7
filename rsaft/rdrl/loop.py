"""The training loop: draw, step, reduce, guard, clip, update, log, evaluate, save.

A run can be stopped, killed and resumed at any moment, and split over any number of processes, without changing its
result: every draw is keyed by (seed, step, sample id), and nothing else is random.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from rsaft import distributed
from rsaft.backbones.distance import weight_distance
from rsaft.backbones.export import export_weights
from rsaft.backbones.pipeline import DiffusersBackbone
from rsaft.errors import CheckpointError, ConfigError, NonFiniteError
from rsaft.flatten.rsa_ft import KeptEps
from rsaft.metrics.evaluate import Measure, evaluate, joined
from rsaft.metrics.gauge import GAUGE, Gauge, Reading
from rsaft.metrics.report import write_report
from rsaft.pareto.agent import Decision, DecisionAgent
from rsaft.rdrl.batches import batches_of, micro_batch_ids, prompt_list, refuse_split_groups
from rsaft.rdrl.checkpoint import list_checkpoints, load_latest, save_checkpoint
from rsaft.rdrl.checkpoint_folder import link_best
from rsaft.rdrl.model_card import write_model_card
from rsaft.rdrl.optimization import Optimization
from rsaft.rdrl.progress import ProgressLine
from rsaft.rdrl.run_agent import RunAgent, followed
from rsaft.rdrl.run_directory import free_run_dir, locked
from rsaft.rdrl.run_files import RunFiles, Trackers
from rsaft.rdrl.run_gauge import RunGauge
from rsaft.rdrl.run_result import RunResult, best_step
from rsaft.rdrl.score import ImageScore, plain_step
from rsaft.rdrl.sharding import assembled, export_assembled, part_of, shard_if_asked
from rsaft.rdrl.signals import StopRequest, agreed
from rsaft.rdrl.train_config import TrainConfig
from rsaft.rdrl.update_record import nonfinite_sentence, update_record
from rsaft.types import Algorithm, GroupObjective, Objective, Reward, Step


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
        gate: Callable[[Tensor, tuple[str, ...]], Tensor] | None = None,
        gauge: Gauge | None = GAUGE,
        on_reading: Callable[[Reading], None] | None = None,
        agent: DecisionAgent | None = None,
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
            gate: which samples' penalty counts, from their rewards (`rsaft.rdrl.kl.OverRated`); all by default.
            gauge: the hacking gauge's settings; None does without it.
            on_reading: called with the gauge's reading of each evaluation, on every process.
            agent: PG-OT's decision agent, which may take rewards out of the objective and go back to a checkpoint.
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
        self.prompts = prompt_list(prompts)
        self.eval_prompts = self.prompts if eval_prompts is None else prompt_list(eval_prompts)
        self._objective = objective
        self.score = ImageScore(backbone, self.rewards, objective, gate)
        distributed.join(backbone.device)
        # Every rank names the first rank's folder, which another rank may already have made.
        self.run_dir = Path(run_dir) if run_dir is not None else distributed.gathered(free_run_dir("run"))[0]
        self._gauge = RunGauge(gauge, self.run_dir, on_reading)
        self._agent = RunAgent(agent, objective, list(self.rewards), self.run_dir, eval_every=self.config.eval_every)
        self._description = description
        self._parts = micro_batch_ids(self.config, world=distributed.world_size(), rank=distributed.rank())
        if isinstance(objective, GroupObjective):
            refuse_split_groups(self.config, world=distributed.world_size())
        shard_if_asked(self.config, backbone, algorithm, step)
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
        with locked(self.run_dir) if main else nullcontext(), StopRequest() as stop:
            restored = self._restore() if resume else None
            files = RunFiles(self.run_dir, restored, self._description, resume=resume) if main else None
            done, signal = self._train(restored or 0, files, stop)
            result = self._result(done, signal)
            if files is not None:
                files.close()
                self._describe(result)
            distributed.barrier()
        return result

    def _train(self, done: int, files: RunFiles | None, stop: StopRequest) -> tuple[int, int | None]:
        """Updates, evaluations and checkpoints until all updates are done or a signal came: (updates done, signal)."""
        c = self.config
        trackers = Trackers(c.trackers, self.run_dir)
        with ProgressLine(done=done, total=c.steps, visible=files is not None, label=self.run_dir.name) as line:
            while True:
                evaluated = bool(self._evaluations) and self._evaluations[-1]["step"] == done  # before it was resumed
                finished, better = done == c.steps or (evaluated and self._gauge.stops), False
                decision: Decision | None = None
                if (done % c.eval_every == 0 or finished) and not evaluated:
                    means = self._evaluate(done, files)
                    trackers.log(means, done)
                    line.evaluated(means)
                    finished, better = finished or self._gauge.stops, self._gauge.best == done
                    decision = self._agent.check(done, self._evaluations)
                    back = None if decision is None else self._follow(decision, files)
                    if back is not None:
                        done = back
                        continue
                finished = finished or self._agent.stopped
                signal = agreed(stop.signal)
                wanted = done % c.save_every == 0 or finished or better or decision is not None or signal is not None
                if wanted and (done or self._agent.settings is not None):
                    self._save(done, files)
                if finished or signal is not None:
                    break
                record = self._update(done, files)
                done += 1
                line.show(done, record)
                trackers.log(record, done)
        trackers.close()
        return done, signal

    def _follow(self, decision: Decision, files: RunFiles | None) -> int | None:
        """Do what the agent decided; the number of updates that it went back to, None if it did not."""
        back = decision.revert_to
        if back is not None:
            self._agent.put_aside(back)
        self._agent.keep(decision)
        if back is None:
            self._obey()
            return None
        distributed.barrier()
        done = self._restore() or 0
        if files is not None:
            files.rewind(done)
        return done

    def _obey(self) -> None:
        """Train by the rewards and the strategy that the agent has left."""
        if self._agent.state is not None:
            self.score = replace(self.score, objective=followed(self._objective, self._agent.state))

    def _update(self, done: int, files: RunFiles | None) -> dict[str, Any]:
        """One update of the weights, from prompts to the optimizer; its record."""
        begun = time.monotonic()
        c = self.config
        batches = batches_of(
            done,
            prompts=self.prompts,
            seed=self._agent.seed(c.seed),
            batch_size=c.batch_size,
            parts=self._parts,
            group_size=c.group_size,
        )
        rollouts = [self.algorithm.rollout(self.backbone, batch) for batch in batches]
        self.optimization.clear()
        output = self.step(rollouts, self.score, self.optimization.params, self._step_state)
        names = list(self.rewards)
        record, share = update_record(output, names, step=done + 1, device=self.backbone.device)
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
            raise NonFiniteError(nonfinite_sentence(output, names, batches[0], in_a_row=self._nonfinite_in_a_row))
        return record

    def _evaluate(self, done: int, files: RunFiles | None) -> dict[str, float]:
        """Score fixed prompts and noises with the averaged weights; log, and save the grid."""
        begun = time.monotonic()
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
                objective=None if isinstance(self.score.objective, GroupObjective) else self.score.objective,
                rows=slice(rank * per, (rank + 1) * per),
            )
            distance = weight_distance(self.backbone)
        whole = self._gauge.look(done, joined(distributed.gathered(part)), distance, self.backbone.device)
        self._agent.look(done, whole)
        means = {"step": done} | whole.means() | (self._gauge.last.values if self._gauge.last else {})
        self._evaluations.append(means)
        if files is not None:
            files.evaluation(done, whole, means, grid=c.grid)
            files.timing.write({"step": done, "evaluation_seconds": time.monotonic() - begun})
        return means

    def _save(self, done: int, files: RunFiles | None) -> None:
        """Write a checkpoint; only the first rank writes, all wait."""
        tensors = self.optimization.tensors()
        if isinstance(self._step_state, KeptEps):
            tensors["step"] = {str(i): e for i, e in enumerate(self._step_state.eps)}
        tensors = assembled(tensors)
        if files is not None:
            files.sync()
            state = self.optimization.state() | {
                "seed": self.config.seed,
                "batch_size": self.config.batch_size,
                "group_size": self.config.group_size,
                "eval_seed": self.config.eval_seed,
                "eval_samples": self.config.eval_samples,
                "nonfinite_in_a_row": self._nonfinite_in_a_row,
                "evaluations": self._evaluations,
                "eps_age": self._step_state.age if isinstance(self._step_state, KeptEps) else None,
            }
            save_checkpoint(
                self.run_dir / "checkpoints",
                step=done,
                tensors=tensors,
                state=state,
                keep=self.config.keep,
                best=self._gauge.best,
                pinned=self._agent.pinned,
                export=lambda folder: self._export(folder, tensors),
            )
            link_best(self.run_dir / "checkpoints", self._gauge.best)
        distributed.barrier()

    def _export(self, folder: Path, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        if distributed.is_sharded(self.optimization.params[0]):
            export_assembled(self.backbone, tensors.get("ema", tensors["weights"]), folder)
            return
        with self.optimization.averaged():
            export_weights(self.backbone, folder)

    def _restore(self) -> int | None:
        """Load the newest good checkpoint; the number of updates it holds, None if there is no checkpoint."""
        found = load_latest(self.run_dir / "checkpoints")
        self._agent.restore(0 if found is None else found.step)
        self._obey()
        if found is None:
            return None
        if distributed.rank() == 0:
            for sentence in found.skipped:
                print(sentence)
        for name in ("seed", "batch_size", "group_size", "eval_seed", "eval_samples"):
            if found.state.get(name, getattr(self.config, name)) != getattr(self.config, name):
                raise CheckpointError(
                    f"{found.path}: the run began with train.{name} = {found.state[name]}, and now it is "
                    f"{getattr(self.config, name)}; set it back, or start a new run."
                )
        self.optimization.restore(found.tensors, found.state)
        self._step_state = None
        if found.state["eps_age"] is not None:
            eps = [part_of(found.tensors["step"][str(i)], p) for i, p in enumerate(self.optimization.params)]
            self._step_state = KeptEps(tuple(eps), found.state["eps_age"])
        self._nonfinite_in_a_row = found.state["nonfinite_in_a_row"]
        self._evaluations = list(found.state["evaluations"])
        self._gauge.restore([int(means["step"]) for means in self._evaluations])
        return found.step

    def _describe(self, result: RunResult) -> None:
        """Write what people read of the run: the report and the model card."""
        write_report([self.run_dir], self.run_dir / "report.html", title=self.run_dir.name)
        write_model_card(
            self.run_dir,
            self.backbone,
            evaluations=self._evaluations,
            step=result.step,
            best=result.best_step,
        )

    def _result(self, done: int, signal: int | None) -> RunResult:
        checkpoints = tuple(list_checkpoints(self.run_dir / "checkpoints"))
        best = best_step(self._evaluations) if self._gauge.best is None else self._gauge.best
        return RunResult(
            self.run_dir, done, best, tuple(self._evaluations), checkpoints, signal, reading=self._gauge.last
        )
