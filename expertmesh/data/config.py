"""The ``[data]`` table of a run file."""

import math
from dataclasses import dataclass, field
from typing import Literal

from expertmesh.data.templates import find_template
from expertmesh.errors import UserError

Objective = Literal["causal", "ul2", "ul2-openmoe"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text, how it is tokenised, and how it is cut."""

    source: str = ""
    """A file or folder, a name of `expertmesh data list`, or hf:NAME[@CONFIG][:SPLIT[:FIELD]]."""
    mix: dict[str, float] = field(default_factory=dict)
    """Several sources with their weights, instead of `source`."""
    kind: Literal["text", "instructions"] = "text"
    """What the sources hold: documents, or questions with answers."""
    fields: tuple[str, ...] = ()
    """Keys or columns of a record: of a document's parts (text, or content), or of the question
    and the answer (usual names are found)."""
    tokenizer: str = "byte"
    """byte, byte-ul2, a tokenizer.json, a SentencePiece .model, a folder, or a catalog name."""
    seq_len: int = 256
    """Tokens of a sample."""
    pack: bool | None = None
    """Fill rows across documents; false gives a document its own rows, padded. Text is packed
    unless this is false; a conversation always has its own row."""
    objective: Objective = "causal"
    """Of text: predict every next token, or cut-out spans and endings, as UL2 or OpenMoE did."""
    template: str = "plain"
    """Of instructions: plain, or openmoe for its chat format."""
    train_on_prompt: bool = False
    """Of instructions: learn the questions too."""
    val_fraction: float = 0.05
    """Share held out for evaluation; 0 holds nothing out."""
    cache: str | None = None
    """Folder for fetched files and tokens; default EXPERTMESH_CACHE or ~/.cache/expertmesh."""

    def __post_init__(self) -> None:
        if self.source and self.mix:
            raise UserError(
                "data: set either source (one data set) or mix (several with weights), "
                f"got source={self.source!r} and mix={self.mix!r}"
            )
        for name, weight in self.mix.items():
            if not 0 < weight < math.inf:
                raise UserError(f"data.mix[{name!r}] must be a positive number, got {weight}")
        if self.seq_len < 1:
            raise UserError(f"data.seq_len must be at least 1, got {self.seq_len}")
        if not 0 <= self.val_fraction < 1:
            raise UserError(
                f"data.val_fraction must be at least 0 and below 1, got {self.val_fraction}"
            )
        find_template(self.template)
        self._refuse_what_does_nothing()

    def _refuse_what_does_nothing(self) -> None:
        of_kind = {"text": ("objective",), "instructions": ("template", "train_on_prompt")}
        defaults = type(self).__dataclass_fields__
        for kind, names in of_kind.items():
            for name in names:
                value = getattr(self, name)
                if kind != self.kind and value != defaults[name].default:
                    raise UserError(
                        f"data.{name} is of data.kind = {kind!r}, got {name}={value!r} with "
                        f"kind={self.kind!r}; leave it out, or set data.kind = {kind!r}"
                    )
        if self.kind == "instructions" and self.pack:
            raise UserError(
                "data.pack must be false with data.kind = 'instructions', got True: a conversation "
                "has its own row; leave data.pack out"
            )
        if self.objective != "causal" and self.pack is False:
            raise UserError(
                f"data.objective = {self.objective!r} cuts across documents, got pack=False; "
                "set data.pack = true"
            )

    @property
    def packs(self) -> bool:
        """Whether rows are filled across documents."""
        return self.kind == "text" and self.pack is not False
