"""The training loop: a run file in, a run's folder out."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from expertmesh import __version__
from expertmesh.data import DataBundle, Loader, build_data
from expertmesh.dispatch.collectives import Group
from expertmesh.errors import UserError
from expertmesh.parallel.agreement import Agreement
from expertmesh.parallel.handshake import same_on_all_ranks
from expertmesh.parallel.processes import joined_world, local_device
from expertmesh.parallel.reports import anyone, largest
from expertmesh.train.build import build_passes
from expertmesh.train.checkpoint import Checkpoint, CheckpointFolder
from expertmesh.train.claim import claim_folder
from expertmesh.train.config import CONFIG, RunFile, differences
from expertmesh.train.display import Display
from expertmesh.train.evaluate import Evaluation, Evaluator
from expertmesh.train.expert_tokens import EXPERT_TOKENS
from expertmesh.train.first_choices import FirstChoices
from expertmesh.train.logger import RunLogger
from expertmesh.train.optimizer import build_optimizer, set_lr
from expertmesh.train.precision import pick_device
from expertmesh.train.progress import (
    Clock,
    forget_routing,
    layer_entries,
    memory_mib,
    overall,
    routing_state,
    routing_summaries,
    set_routing_state,
)
from expertmesh.train.provenance import check_same_data, save_provenance
from expertmesh.train.published import check_publishable, load_initial, publish
from expertmesh.train.run_file import load_run_file
from expertmesh.train.signals import StopRequest
from expertmesh.train.step import Stepper, StepResult, check_finite

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Outcome:
    """How a call of ``Trainer.fit`` ended.

    Attributes:
        step: Optimizer steps done.
        stopped_by: The signal that ended it early, or None.
        evaluation: Of the last step, where the run is done and has a held-out split.
    """

    step: int
    stopped_by: str | None
    evaluation: Evaluation | None


class Trainer:
    """One run, from its run file: built, continued if it was begun before, and trained.

    Everything a step does follows from the run file, the step's number, and the state that
    checkpoints hold. So a continued run repeats the uninterrupted one: bitwise on the CPU with as
    many threads, to rounding elsewhere.

    Args:
        run: The run file.
        data: Its data, if built already.

    Raises:
        UserError: If the run file does not fit the machine, the data or an existing checkpoint.
    """

    def __init__(self, run: RunFile, data: DataBundle | None = None) -> None:
        check_publishable(run)
        self.run = run
        self.device = local_device(pick_device(run.run.device))
        self.mesh = run.mesh.build(joined_world(), run.model.num_experts, self.device)
        self.ranks = Agreement(None if self.mesh is None else self.mesh.everyone)
        same_on_all_ranks(_flat(run), self.ranks)
        self.checkpoints = CheckpointFolder(
            run.folder / CHECKPOINTS, keep=run.train.keep, group=self._everyone
        )
        with self.ranks.together():
            if self.ranks.first:
                self._lock = claim_folder(run, begun=bool(self.checkpoints.complete()))
        resume_from, self.notes = self._find_checkpoint()
        self.data = self._read_data() if data is None else data
        same_on_all_ranks({"data": _identity(self.data)}, self.ranks)
        check_data_fits(run, self.data)
        if resume_from is not None:
            with self.ranks.together():
                check_same_data(run.folder, self.data.provenance)
        self.loader = Loader(self.data.train, batch_size=run.train.batch, seed=run.run.seed)
        if run.train.epochs is not None:
            self.run = run = run.of_length(self.loader.steps(run.train.epochs))
        self.evaluator = make_evaluator(run, self.data)
        self.passes = build_passes(run, self.device, self.mesh)
        self.model = self.passes.model
        self.stepper = Stepper(
            self.passes,
            build_optimizer(self.model, run.optim, self.mesh),
            seed=run.run.seed,
            clip=run.optim.clip,
        )
        self.clock = Clock()
        self.step = 0
        if resume_from is not None:
            self._restore(resume_from)
        elif run.init.from_:
            load_initial(self.passes.model, run.init.from_, self.mesh)

    @property
    def done(self) -> bool:
        """Whether every step was taken."""
        return self.step >= self.run.train.steps

    def changes(self) -> list[str]:
        """What the run file says otherwise than when the run was last started."""
        path = self.run.folder / CONFIG
        return differences(load_run_file(path), self.run) if path.exists() else []

    def fit(self, display: Display) -> Outcome:
        """Train to the last step, or until a signal asks for a stop, and save.

        Args:
            display: Shows progress.

        Raises:
            UserError: If the loss is not finite or a checkpoint cannot be written; the last good
                checkpoint is untouched.
        """
        logger = self._open_folder()
        evaluation = None
        saved_step = self.step
        with StopRequest() as stop:
            try:
                while not self.done and not self._anyone(stop.name is not None):
                    result = self._advance()
                    display.advance(self.step, result.loss)
                    evaluation = self._log(result, logger, display)
                    if self._due(self.run.train.save_every):
                        self.save()
                        saved_step = self.step
            finally:
                if logger is not None:
                    logger.close()
            if saved_step != self.step:
                self.save()
            self.checkpoints.wait()
            if self.done and self.run.train.save_published:
                publish(self.passes.model, self.run, self.mesh, self.step)
        stopped_by = None if self.done else stop.name or "a signal to another rank"
        return Outcome(self.step, stopped_by, evaluation)

    def save(self) -> Checkpoint:
        """Write a checkpoint of the present step.

        Raises:
            UserError: If it cannot be written, or a weight is not finite: a gradient that was can
                lead there, and such a checkpoint would push out those that can be continued.
        """
        with self.ranks.together():
            check_finite(self.model, self.step)
        state = {
            "tokens": self.clock.tokens,
            "seconds": self.clock.seconds,
            "scaler": self.stepper.loss_scale.state_dict(),
            "optimizer": self.run.optim.name,
            "routing": routing_state(self.model, self.device, self.mesh, self.ranks),
        }
        return self.checkpoints.save(
            self.step,
            self.model,
            self.stepper.optimizer,
            state,
            asynchronous=self.run.train.async_save,
        )

    def _advance(self) -> StepResult:
        step = self.step + 1
        self.clock.start()
        set_lr(self.stepper.optimizer, self._lr(step))
        result = self.stepper.step(step, self.loader.batch(step - 1))
        self.step = step
        self.clock.stop(result.num_tokens)
        return result

    def _lr(self, step: int) -> float:
        return self.run.optim.lr * self.run.schedule(step)

    def _due(self, every: int) -> bool:
        return self.done or (every > 0 and self.step % every == 0)

    @property
    def _everyone(self) -> Group | None:
        return None if self.mesh is None else self.mesh.everyone

    def _anyone(self, flag: bool) -> bool:
        return flag if self.mesh is None else anyone(flag, self.mesh)

    def _open_folder(self) -> RunLogger | None:
        """Write what the run is; the first rank does, for all."""
        with self.ranks.together():
            if not self.ranks.first:
                return None
            self.run.save()
            save_provenance(self.run.folder, self.data.provenance)
            if not self.done:
                # It is of an earlier end, and would be taken for this one's.
                (self.run.folder / EXPERT_TOKENS).unlink(missing_ok=True)
            tensorboard = self.run.run.tensorboard
            return RunLogger(self.run.folder, after=self.step, tensorboard=tensorboard)

    def _log(
        self, result: StepResult, logger: RunLogger | None, display: Display
    ) -> Evaluation | None:
        """Write the step's line if it is due, with an evaluation if that is due."""
        evaluate = self.evaluator is not None and self._due(self.run.eval.every)
        if not (evaluate or self.step == 1 or self._due(self.run.train.log_every)):
            return None
        # The layers' counters are read before the evaluation, which counts too.
        summaries = routing_summaries(self.model, self.mesh, self.ranks)
        metrics: dict[str, Any] = {"step": self.step, "loss": result.loss}
        layers = layer_entries(summaries)
        evaluation = None
        if evaluate and self.evaluator is not None:
            with self.ranks.together():
                check_finite(self.model, self.step)
            with FirstChoices(self.model) as first_choices:
                evaluation = self.evaluator(self.passes)
            first_choices.add_other_ranks(self.ranks)
            for name, statistics in first_choices.statistics().items():
                layers[name]["by_token"] = statistics
            metrics["val_loss"] = evaluation.loss
            if evaluation.bits_per_byte is not None:
                metrics["val_bits_per_byte"] = evaluation.bits_per_byte
            forget_routing(self.model)
        metrics["lr"] = self._lr(self.step)
        if result.grad_norm is not None:
            metrics["grad_norm"] = result.grad_norm
        metrics |= {
            "tokens_per_second": self.clock.tokens_per_second(),
            "memory_mib": largest(memory_mib(self.device), self.ranks),
            **overall(summaries),
            "tokens": self.clock.tokens,
            "seconds": self.clock.seconds,
        }
        if self.stepper.loss_scale.enabled:
            metrics["loss_scale"] = self.stepper.loss_scale.scale
        if logger is not None:
            logger.log(metrics, layers)
        display.log(metrics)
        return evaluation

    def _read_data(self) -> DataBundle:
        """All ranks read; one tells of it."""
        with self.ranks.together():
            if self.ranks.first:
                return build_data(self.run.data)
            return build_data(self.run.data, say=lambda _: None)

    def _find_checkpoint(self) -> tuple[Checkpoint | None, list[str]]:
        if self.run.run.resume == "none" and self.checkpoints.steps():
            raise UserError(
                f"{self.run.folder} already holds a run, and run.resume is 'none'; "
                'set run.resume = "auto" to continue it, or run.dir to a new folder'
            )
        return self.checkpoints.newest_valid()

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state()
        if (saved := state.get("optimizer", "adamw")) != (name := self.run.optim.name):
            raise UserError(
                f"{checkpoint.path} holds the state of optim.name={saved!r}, got {name!r}; "
                f'set optim.name = "{saved}", or run.dir to a new folder'
            )
        checkpoint.load_model(self.model)
        checkpoint.load_optimizer(self.model, self.stepper.optimizer)
        self.stepper.loss_scale.load_state_dict(state["scaler"])
        # Checkpoints of earlier versions have none.
        set_routing_state(self.model, state.get("routing", {}), self.device, self.mesh)
        self.clock = Clock(state["seconds"], state["tokens"])
        self.step = checkpoint.step


def make_evaluator(run: RunFile, data: DataBundle) -> Evaluator | None:
    """The run's evaluation; None without a held-out split."""
    if data.val is None:
        return None
    return Evaluator(
        dataset=data.val,
        batch=run.train.batch,
        batches=run.eval.batches,
        tokenizer=data.tokenizer,
    )


def check_data_fits(run: RunFile, data: DataBundle) -> None:
    """Refuse a model that has no embedding for some token, or no position for some place."""
    needed, given = data.tokenizer.vocab_size, run.model.vocab_size
    if given < needed:
        raise UserError(
            f"model.vocab_size must be at least {needed}, the size of data.tokenizer="
            f"{run.data.tokenizer!r}, got {given}; set model.vocab_size = {needed}"
        )
    longest, seq_len = run.model.max_seq_len, run.data.seq_len
    if seq_len > longest:
        raise UserError(
            f"data.seq_len must be at most model.max_seq_len={longest}, got {seq_len}; "
            f"set data.seq_len = {longest} or model.max_seq_len = {seq_len}"
        )


def _flat(run: RunFile) -> dict[str, object]:
    """Every field of a run file by its name, and what computes it."""
    tables: dict[str, Any] = asdict(run)
    facts: dict[str, object] = {
        f"{section}.{key}": value
        for section, values in tables.items()
        for key, value in values.items()
    }
    return facts | {"expertmesh": __version__, "torch": torch.__version__}


def _identity(data: DataBundle) -> object:
    provenance = data.provenance
    return provenance["tokenizer_identity"], [r["sha256"] for r in provenance["sources"]]
