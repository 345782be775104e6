"""The fields of `lowrank.json` and of `quantization_config`, the records of a compressed model."""

from typing import Annotated, Any, Literal

from pydantic import Field, FiniteFloat, NonNegativeInt, PositiveInt, model_validator

from lowrank.compression.probes import ELSEWHERE
from lowrank.io.schemas import Schema, one_of

NEEDED = {  # by other kinds: sizes, rank and bias
    "packed": {"parts"},
    "linear": {"in", "out", "bias"},
    "quantized": {"in", "out", "bias", "bits", "group"},
    "usv_conv2d": {"rank"},
}


class _LayerRecord(Schema):
    """Hold how a layer differs from that of the base architecture; without a kind it does not."""

    kind: str | None = None
    inputs: PositiveInt | None = Field(None, alias="in")
    out: PositiveInt | None = None
    rank: PositiveInt | None = None
    bias: bool | None = None
    bits: Literal[4, 8] | None = None
    group: PositiveInt | None = None
    parts: list[str] | None = None
    dtype: str | None = None

    @model_validator(mode="after")
    def _check_kind(self) -> "_LayerRecord":
        needed = NEEDED.get(self.kind, {"in", "out", "bias", "rank"}) if self.kind else set()
        held = self.model_dump(by_alias=True)
        if missing := sorted(key for key in needed if held[key] is None):
            raise ValueError(f"have the key {missing[0]!r}")
        sizes = [size for size in (self.inputs, self.out) if size is not None]
        if self.kind and self.rank is not None and sizes and self.rank > min(sizes):
            raise ValueError("have a rank of at most its sizes")
        return self


class PretrainedRecord(Schema):
    """Hold the fields of `quantization_config` that a model is loaded with.

    **Arguments**

    - `layers`: layer -> how it differs from the base architecture.
    """

    layers: dict[str, _LayerRecord]


class _BaseRecord(Schema):
    """Hold how to build the base architecture."""

    transformers: str | None = None
    timm: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)


class _InputRecord(Schema):
    """Hold what an input of the model looks like."""

    shape: list[PositiveInt] = Field(min_length=1)
    below: PositiveInt | None = None


class _ProbeRecord(Schema):
    """Hold inputs, and outputs of the saved model."""

    inputs: dict[str, _InputRecord]
    dtype: Annotated[str, one_of(str(dtype).removeprefix("torch.") for dtype in ELSEWHERE)]
    count: NonNegativeInt
    outputs: list[float]
    versions: dict[str, str | None]


class CardRecord(Schema):
    """Hold what the model card says and nothing else of the record does; all of it may be unknown.

    **Arguments**

    - `base_model`: the name of the dense model on the Hub.
    - `license`: as the Hub writes it, such as "apache-2.0".
    - `calibration`: what the statistics were collected on, such as `{"data": "SetFit/sst2", "samples": 256}`.
    - `quality`: metric -> value of the compressed model, or `{"dense": value, "compressed": value}`.
    """

    base_model: str | None = None
    license: str | None = None
    calibration: dict[str, str | int | float | bool | None] | None = None
    quality: dict[str, FiniteFloat | int | dict[str, FiniteFloat | int]] | None = None


class CompressedRecord(Schema):
    """Hold the fields of `lowrank.json` that a model is loaded with; `save_compressed` says what they are.

    **Arguments**

    - `base`, `model`, `layers`, `tensors`, `tied`, `buffers`, `files`, `extra`, `probe`, `bytes`, `card`: the fields; old folders
      lack the last six.
    """

    base: _BaseRecord | None
    model: str | None
    layers: dict[str, _LayerRecord]
    tensors: str
    tied: dict[str, str]
    buffers: list[str] = Field(default_factory=list)
    files: list[str] = Field(default_factory=list)
    extra: dict[str, Any] = Field(default_factory=dict)
    probe: _ProbeRecord | None = None
    bytes: NonNegativeInt | None = None
    card: CardRecord | None = None
