"""A run as one value: what a run file and the command line's overrides say, checked."""

import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from expertmesh.data import DataConfig
from expertmesh.errors import UserError
from expertmesh.kernels.cross_entropy import CrossEntropy
from expertmesh.models.config import DecoderConfig
from expertmesh.train import toml
from expertmesh.train.files import write_whole
from expertmesh.train.mesh import MeshConfig
from expertmesh.train.optimizer import OptimConfig
from expertmesh.train.precision import PrecisionName
from expertmesh.train.schedule import Schedule

CONFIG = "config.toml"
NOTHING = "none"
"""How run files and overrides say None where a field may be None: TOML has no null."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run lives and how it starts.

    Attributes:
        dir: The run's folder.
        resume: ``"auto"`` continues from the newest good checkpoint in ``dir``; ``"none"`` refuses
            a folder that has one.
        seed: Of the initial weights, the order of samples and routing noise.
        device: ``"auto"``, or a torch device.
        tensorboard: Also write TensorBoard events.
    """

    dir: str = "runs/run"
    resume: Literal["auto", "none"] = "auto"
    seed: int = 0
    device: str = "auto"
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if not self.dir:
            raise UserError("run.dir must name a folder, got ''; set run.dir, as in \"runs/one\"")


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """What a new run's weights are; one that is continued has its own.

    Attributes:
        from_: ``init.from``: a folder of published weights, or the name of such a model on the
            hub. Empty: random values.
    """

    from_: str = ""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """A token's loss in training; evaluation measures plain cross entropy.

    Attributes:
        label_smoothing: Share of the target's probability spread over all words.
        z_loss: Weight of the squared log of the softmax's normaliser.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        try:
            _ = self.kind
        except ValueError as error:
            raise UserError(f"loss.{error}") from None

    @property
    def kind(self) -> CrossEntropy:
        """The same, as the loss takes it."""
        return CrossEntropy(label_smoothing=self.label_smoothing, z_loss=self.z_loss)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop.

    Attributes:
        steps: Optimizer steps.
        epochs: In place of ``steps``: so many that each sample comes so often, rounded up.
        batch: Sequences of one optimizer step, over the whole mesh.
        micro_batch: Sequences of one forward pass, over the whole mesh; None is ``batch``.
        precision: ``"fp32"``, or autocast to ``"bf16"`` or ``"fp16"`` (dynamic loss scale).
        checkpoint_activations: Recompute each block in the backward pass.
        compile: Compile the model with ``torch.compile``.
        log_every: Steps between lines.
        save_every: Steps between checkpoints; the last step always makes one. 0: only the last.
        keep: Checkpoints kept.
        async_save: Write checkpoints in a thread while training goes on.
        save_published: After the last step, also write the weights as the model's authors publish
            them.
    """

    steps: int = 1000
    epochs: float | None = None
    batch: int = 16
    micro_batch: int | None = None
    precision: PrecisionName = "fp32"
    checkpoint_activations: bool = False
    compile: bool = False
    log_every: int = 10
    save_every: int = 200
    keep: int = 2
    async_save: bool = False
    save_published: bool = False

    def __post_init__(self) -> None:
        if self.epochs is not None:
            self._check_epochs(self.epochs)
        least_values = {"steps": 1, "batch": 1, "log_every": 1, "save_every": 0, "keep": 1}
        for name, least in least_values.items():
            value = getattr(self, name)
            if value < least:
                raise UserError(
                    f"train.{name} must be at least {least}, got {value}; "
                    f"set train.{name} = {least}"
                )
        if self.batch % self.sequences:
            raise UserError(
                f"train.micro_batch must divide train.batch={self.batch}, got {self.micro_batch}; "
                f"set train.micro_batch = {_nearest_divisor(self.batch, self.sequences)}"
            )

    def _check_epochs(self, epochs: float) -> None:
        if not 0 < epochs < math.inf:
            raise UserError(f"train.epochs must be above 0, got {epochs}; set train.epochs = 1")
        if self.steps != TrainConfig.steps:
            raise UserError(
                f"train.epochs takes the place of train.steps, got epochs={epochs} with "
                f"steps={self.steps}; leave steps out of the run file, or set train.epochs = "
                f"{NOTHING!r}"
            )

    @property
    def sequences(self) -> int:
        """Sequences of one forward pass."""
        if self.micro_batch is None:
            return self.batch
        if self.micro_batch < 1:
            raise UserError(
                f"train.micro_batch must be at least 1, got {self.micro_batch}; "
                f"set train.micro_batch = {self.batch}"
            )
        return self.micro_batch


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation on the held-out split.

    Attributes:
        every: Steps between evaluations; the last step always makes one. 0: only the last.
        batches: Batches of ``train.batch`` sequences each time, spread evenly over the split; None,
            said ``"none"``, is the whole split.
    """

    every: int = 100
    batches: int | None = 8

    def __post_init__(self) -> None:
        if self.every < 0:
            raise UserError(f"eval.every must be at least 0, got {self.every}; set eval.every = 0")
        if self.batches is not None and self.batches < 1:
            raise UserError(
                f"eval.batches must be at least 1, got {self.batches}; set eval.batches = 1"
            )


@dataclass(frozen=True, kw_only=True)
class RunFile:
    """Everything that decides a run's numbers. Each field is a table of the run file.

    Attributes:
        run: Folder, seed, device.
        model: The decoder; in a file, ``preset = NAME`` gives values to begin from.
        init: Weights to begin from.
        loss: What a token's loss is.
        data: What is read, and how it is cut into samples.
        train: The loop.
        optim: The optimizer and its schedule.
        eval: Evaluation.
        mesh: Processes.
    """

    run: RunConfig = field(default_factory=RunConfig)
    model: DecoderConfig
    init: InitConfig = field(default_factory=InitConfig)
    data: DataConfig
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        if self.model.losses != "attach":
            raise UserError(
                f"model.losses must be 'attach' in a run, got {self.model.losses!r}: the trainer "
                "adds no balance losses by itself; leave it out"
            )

    def of_length(self, steps: int) -> "RunFile":
        """The run with so many steps, whatever it says of epochs."""
        return replace(self, train=replace(self.train, steps=steps, epochs=None))

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.run.dir)

    @property
    def schedule(self) -> Schedule:
        """The learning rate's factor by step."""
        return Schedule(
            name=self.optim.schedule,
            steps=self.train.steps,
            warmup_steps=self.optim.warmup_steps,
            decay_steps=self.optim.decay_steps,
            final=self.optim.final,
        )

    def to_toml(self) -> str:
        """A run file that gives this very run: presets are resolved into their values."""
        tables = asdict(self)
        # Elsewhere a null is the default and may be left out; in these two it need not be.
        for table in (tables["model"]["router_options"], tables["eval"]):
            table |= {key: NOTHING for key, value in table.items() if value is None}
        return toml.dumps(
            {name: {as_key(k): v for k, v in table.items()} for name, table in tables.items()}
        )

    def save(self) -> Path:
        """Write ``config.toml`` into the run's folder, whole or not at all.

        Beside the run that it is of, ``run.resume = "none"`` would refuse whoever starts it.
        """
        again = replace(self, run=replace(self.run, resume="auto"))
        return write_whole(self.folder / CONFIG, again.to_toml())


def differences(old: RunFile, new: RunFile) -> list[str]:
    """Lines ``"section.key: old -> new"`` for the fields that differ."""
    before: dict[str, Any] = asdict(old)
    after: dict[str, Any] = asdict(new)
    return [
        f"{section}.{as_key(key)}: {value!r} -> {after[section][key]!r}"
        for section, values in before.items()
        for key, value in values.items()
        if value != after[section][key]
    ]


def as_key(field_name: str) -> str:
    """A field's name in a run file: one that is Python's own word ends with ``_`` in code."""
    return field_name.rstrip("_")


def _nearest_divisor(number: int, wanted: int) -> int:
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda divisor: abs(divisor - wanted))
