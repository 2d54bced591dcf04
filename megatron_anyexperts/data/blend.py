"""Which blends and data sets are read: those that consist of data.

Energon (7.4.1) imports whatever class or function a blend or a data set's description names, and runs Python files that
lie beside the shards (`part_filter`). Shards come from others, so everything but the two known classes and plain values
is refused here, before Energon looks at it, through the same parser.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from megatron.energon import WorkerConfig, load_dataset
from megatron.energon.epathlib import EPath
from megatron.energon.eyaml import load_yaml
from megatron.energon.flavors.webdataset.config import MAIN_FOLDER_NAME
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from megatron_anyexperts.data.config import DataConfig
from megatron_anyexperts.data.faults import DataFeedError

FileName = Annotated[str, StringConstraints(pattern=r"^[^/\\]+\.ya?ml$")]
Subflavors = dict[str, str | int | float | bool]


class _Plain(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Reference(_Plain):
    path: str
    weight: int | float | None = Field(None, ge=0, allow_inf_nan=False)
    repetitions: int | float | None = Field(None, gt=0, allow_inf_nan=False)
    subflavors: Subflavors | None = None
    dataset_config: FileName | None = None
    split_config: FileName | None = None
    split_part: str | None = None
    shuffle_over_epochs_multiplier: int | None = None
    subset: dict[Literal["range"], list[str | int]] | None = None


class _Split(_Plain):
    blend: list[_Reference] | None = None
    blend_epochized: list[_Reference] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> "_Split":
        if (self.blend is None) == (self.blend_epochized is None):
            raise ValueError("a split is either a blend or a blend_epochized")
        weights = [1 if entry.weight is None else entry.weight for entry in self.blend or ()]
        if self.blend and not 0 < sum(weights) < math.inf:
            raise ValueError(f"the weights of a blend add up to {sum(weights):g}; at least one must be above 0")
        return self


class _Blend(_Plain):
    module: Literal["megatron.energon"] = Field(alias="__module__")
    name: Literal["MetadatasetV2"] = Field(alias="__class__")
    splits: dict[str, _Split]


class _Dataset(_Plain):
    module: Literal["megatron.energon"] = Field(alias="__module__")
    name: Literal["CrudeWebdataset"] = Field(alias="__class__")
    subflavors: Subflavors | None = None


class UntrustedBlend(DataFeedError):
    """A blend or data set description asks for more than data."""


def open_blend(blend: str | Path, split: str, config: DataConfig, workers: WorkerConfig) -> Any:
    """Energon's loaded datasets of one split of a blend.

    Raises:
        FileNotFoundError: there is no such file or folder.
        UntrustedBlend: it, or a data set of it, names other classes or keys than data needs.
        DataFeedError: it has no such split.
    """
    if "://" not in str(blend) and not Path(blend).exists():
        raise FileNotFoundError(f"data blend {blend} does not exist; build it with data_tools/build_shards.py")
    check_blend(EPath(str(blend)))
    check_splits(blend, (split,))
    training = split == "train"
    options = {"max_samples_per_sequence": config.data_run_length, "shuffle_over_epochs_multiplier": 1}
    datasets = load_dataset(str(blend)).get_datasets(
        training=training,
        split_part=split,
        worker_config=workers,
        decoder=None,
        **(options | {"parallel_shard_iters": config.data_open_shards} if training else {}),
    )
    return datasets


def check_splits(blend: str | Path, splits: Iterable[str]) -> None:
    """Make sure that a blend has splits, before anything expensive starts.

    Raises:
        DataFeedError: with the missing one and the way out.
    """
    if not str(blend).endswith((".yaml", ".yml")):
        return
    present = _read(EPath(str(blend)), _Blend).splits
    way_out = {
        "train": "every sample is held out: build with a smaller validation_fraction",
        "val": "nothing is held out: set --eval-iters 0, or build with a larger validation_fraction",
    }
    for split in splits:
        if split not in present:
            raise DataFeedError(f"{blend} has no {split} split (it has {', '.join(present)}), so {way_out[split]}")


def check_blend(path: EPath, config: str = "dataset.yaml", above: tuple[str, ...] = ()) -> None:
    """Refuse a blend, or a folder of shards, unless it and all that it refers to is data.

    Args:
        path: a blend file or a folder of shards.
        config: file name of a folder's description.
        above: blends that refer to this one.

    Raises:
        UntrustedBlend: with the file, the key and what is accepted.
        FileNotFoundError: a file that it refers to is missing.
    """
    if path.name.endswith((".yaml", ".yml")):
        if str(path) in above:
            raise UntrustedBlend(f"{path} refers to itself")
        for split in _read(path, _Blend).splits.values():
            for entry in split.blend or split.blend_epochized or ():
                check_blend(path.parent / entry.path, entry.dataset_config or "dataset.yaml", (*above, str(path)))
    elif path.name.endswith(".jsonl"):
        raise UntrustedBlend(f"{path}: JSON lines are no shards; build them with data_tools/build_shards.py")
    else:
        _read(path / MAIN_FOLDER_NAME / config, _Dataset)


def _read(path: EPath, model: type[_Plain]) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; build shards and blend with data_tools/build_shards.py")
    try:
        return model.model_validate(load_yaml(path.read_bytes()))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        accepted = ", ".join(field.alias or name for name, field in model.model_fields.items())
        raise UntrustedBlend(
            f"{path}: {place}={first['input']!r} is not accepted ({first['msg']}): shards are read as data, and "
            f"Energon would import or run what other keys and classes name; accepted here: {accepted}, as "
            "build_shards.py and plan_mixture.py write them"
        ) from error
    except Exception as error:
        raise UntrustedBlend(f"{path} is not YAML: {error}") from error
