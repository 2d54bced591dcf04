"""Every place where this project replaces, or relies on, an inner part of Megatron, Energon or torch.

Preparing for a new release of one of them means reading this table. `replace` refuses what is not in it, and
`tests/unit/platform/test_seams.py` holds it against the sources and against the installed releases.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any

REPLACED, OBJECT, READ = "replaced", "replaced in an object", "read"


@dataclass(frozen=True)
class Seam:
    """One inner part of a release."""

    module: str
    attribute: str
    """Path inside the module, such as ``ChainedOptimizer.sharded_state_dict``."""
    how: str
    """`REPLACED` for the whole process, `OBJECT` in objects that we hold, `READ`: private, and we depend on it."""
    where: str
    """File of ours."""
    reason: str
    test: str
    """File that shows it, or fails when it is gone."""
    only_without_cuda: bool = False

    @property
    def name(self) -> str:
        """Dotted name."""
        return f"{self.module}.{self.attribute}"


_LOOP = "megatron.training.training"
_CHECKPOINTING = "megatron.training.checkpointing"

SEAMS = (
    Seam(
        _LOOP, "save_checkpoint", REPLACED, "training/checkpoints.py",
        "a save is sealed with hashes before the tracker names it, keeps the data state, and may fail without an end",
        "tests/unit/survival/test_failed_saves.py",
    ),
    Seam(
        _LOOP, "load_checkpoint", REPLACED, "training/checkpoints.py",
        "loads the newest sound checkpoint and the data state with it", "tests/unit/survival/test_checkpoints.py",
    ),
    Seam(
        _CHECKPOINTING, "get_checkpoint_tracker_filename", REPLACED, "training/checkpoints.py",
        "the tracker is written before the files are known to be whole: that early update goes elsewhere",
        "tests/unit/survival/test_failed_saves.py",
    ),
    Seam(
        _CHECKPOINTING, "schedule_async_save", REPLACED, "training/checkpoints.py",
        "an asynchronous save is sealed when it is through", "tests/unit/survival/test_failed_saves.py",
    ),
    Seam(
        _LOOP, "training_log", REPLACED, "training/metrics.py",
        "the first step after a start is printed without clearing its sums, which the next means then contain again",
        "tests/end_to_end/test_pretrain.py",
    ),
    Seam(
        _LOOP, "evaluate", REPLACED, "training/evaluations.py",
        "held-out losses are printed and dropped, and a run keeps them", "tests/end_to_end/test_pretrain.py",
    ),
    Seam(
        _LOOP, "evaluate_and_print_results", REPLACED, "training/evaluations.py",
        "it knows the iteration of an evaluation, which `evaluate` does not", "tests/end_to_end/test_pretrain.py",
    ),
    Seam(
        _LOOP, "get_megatron_optimizer_config", REPLACED, "training/learning_rates.py",
        "the loop has no way to give parts of the model their own learning rates",
        "tests/unit/training/test_learning_rates.py",
    ),
    Seam(
        "megatron.core.optimizer.distrib_optimizer", "DistributedOptimizer.load_state_dict", REPLACED,
        "training/schedule.py", "learning rates and the like of the command line hold, not those of the checkpoint",
        "tests/unit/training/test_schedule.py",
    ),
    Seam(
        "megatron.core.optimizer.optimizer", "MegatronOptimizer._filter_and_reorder_param_groups", REPLACED,
        "training/schedule.py", "groups of other settings are the same groups: matched by their parameters",
        "tests/unit/training/test_schedule.py",
    ),
    Seam(
        "megatron.core.optimizer.optimizer", "FP32Optimizer.sharded_state_dict", REPLACED, "training/schedule.py",
        "numbers of parameters in saved groups would be merged one by one", "tests/unit/training/test_schedule.py",
    ),
    Seam(
        "megatron.training.global_vars", "_GLOBAL_SIGNAL_HANDLER", REPLACED, "training/stopping.py",
        "the handler of the loop heeds one signal, and Ctrl-C ends it with a traceback",
        "tests/end_to_end/test_stopping.py",
    ),
    Seam(
        "megatron.training.global_vars", "_GLOBAL_TENSORBOARD_WRITER", REPLACED, "training/curves.py",
        "a full disk under the curves would end the run", "tests/end_to_end/test_full_disk.py",
    ),
    Seam(
        "megatron.core.dist_checkpointing.strategies.filesystem_async", "_results_queue", REPLACED,
        "training/pretrain.py", "its process would be spawned during the first save and outlive a killed trainer",
        "tests/unit/survival/test_signals.py",
    ),
    Seam(
        "torch.distributed.checkpoint.filesystem", "pickle", REPLACED, "platform/torch_checkpoint.py",
        ".metadata of a checkpoint is unpickled without a restriction", "tests/unit/platform/test_torch_checkpoint.py",
    ),
    Seam(
        "torch.distributed.checkpoint.default_planner", "DefaultLoadPlanner.load_bytes", REPLACED,
        "platform/torch_checkpoint.py", "objects beside tensors are unpickled without a restriction",
        "tests/unit/platform/test_torch_checkpoint.py",
    ),
    Seam(
        "megatron.core.transformer.multi_token_prediction", "_roll_tensor_packed_seq", REPLACED,
        "platform/packed_rows.py", "it waits for the GPU four times for each document of a row, in each of four rolls",
        "tests/unit/platform/test_packed_rows.py",
    ),
    Seam(
        "megatron.core.models.hybrid.hybrid_model", "process_mtp_loss", REPLACED, "platform/cut_rows.py",
        "it weighs a context-parallel rank's prediction losses by the targets of that rank alone",
        "tests/distributed/test_context_parallel.py",
    ),
    Seam(
        "megatron.energon", "BlendDataset.__iter__", OBJECT, "data/scheduled_blend.py",
        "weights that change at declared steps", "tests/feed/test_mixture_schedule.py",
    ),
    Seam(
        "megatron.energon.flavors.webdataset.sample_loader", "WebdatasetSampleLoaderDataset", OBJECT,
        "data/shard_reader.py", "its readers let damage end the run, past every error handler",
        "tests/feed/test_faults.py",
    ),
    Seam(
        "torch.utils.data", "DataLoader._iterator", READ, "data/loader.py",
        "whether the worker processes live: Energon would wait for the state of a dead one for ever",
        "tests/feed/test_faults.py",
    ),
    Seam(
        "megatron.core.rerun_state_machine", "_GLOBAL_RERUN_STATE_MACHINE", READ, "moe/controllers.py",
        "whether a step is being repeated; the public call would create the machine",
        "tests/unit/moe/test_controllers.py",
    ),
    Seam(
        "megatron.core.num_microbatches_calculator", "StepBatchsizeNumMicroBatchesCalculator._parse_schedule", READ,
        "training/batch_sizes.py", "the sizes of a growing batch, before Megatron's own checks",
        "tests/unit/training/test_batch_sizes.py",
    ),
)  # fmt: skip


def seams() -> tuple[Seam, ...]:
    """All of them, with the repairs of `platform/megatron.py` and the bridges of `platform/cpu.py`."""
    from megatron_anyexperts.platform import cpu, megatron

    repairs = (
        Seam(
            repair.owner.__module__,
            f"{repair.owner.__name__}.{repair.attribute}",
            REPLACED,
            "platform/megatron.py",
            repair.reason,
            "tests/unit/platform/test_megatron.py",
        )
        for repair in megatron.REPAIRS
    )
    bridges = (
        Seam(
            bridge.module,
            bridge.attribute,
            REPLACED,
            "platform/cpu.py",
            bridge.reason,
            "tests/unit/platform/test_cpu_bridge.py",
            only_without_cuda=True,
        )
        for bridge in cpu.BRIDGES
    )
    return (*SEAMS, *repairs, *bridges)


def owner_of(module: str, attribute: str) -> tuple[Any, str]:
    """The object that holds an attribute, and the last part of its path."""
    *path, name = attribute.split(".")
    return functools.reduce(getattr, path, importlib.import_module(module)), name


def replace(module: str, attribute: str, value: Any) -> None:
    """Replace an inner part for the whole process.

    Raises:
        LookupError: the table does not have it.
    """
    if not any((seam.module, seam.attribute, seam.how) == (module, attribute, REPLACED) for seam in SEAMS):
        raise LookupError(f"{module}.{attribute} is replaced, but platform/seams.py does not say so")
    owner, name = owner_of(module, attribute)
    setattr(owner, name, value)


def describe() -> str:
    """The table as text, a paragraph for each."""
    lines = []
    for seam in seams():
        condition = ", only without CUDA" if seam.only_without_cuda else ""
        lines += [f"{seam.name} ({seam.how}{condition})", f"  {seam.reason}", f"  {seam.where}; {seam.test}"]
    return "\n".join(lines)
