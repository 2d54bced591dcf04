"""The held-out microbatches: fixed, the same at every evaluation and in every layout."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.energon import WorkerConfig
from megatron.energon.flavors.webdataset.itar_reader import ShardInfosITarReader

from megatron_anyexperts.data.blend import open_blend
from megatron_anyexperts.data.config import DataConfig
from megatron_anyexperts.data.cookers import cook
from megatron_anyexperts.data.encode import DocumentEncoder
from megatron_anyexperts.data.faults import DataFeedError, FaultLedger, Quarantine
from megatron_anyexperts.data.microbatch import Microbatch, collate
from megatron_anyexperts.data.packing import assemble_row, pack_rows, row_order
from megatron_anyexperts.data.samples import Planned, SampleError
from megatron_anyexperts.data.shard_reader import ShardReader
from megatron_anyexperts.data.vocabulary import Vocabulary
from megatron_anyexperts.media import MODALITY_CODES, MediaShape


class ValidationLoader:
    """Endless iterator over the held-out microbatches of one data-parallel rank.

    The ``val`` split of every dataset in the blend is read in shard order; datasets take turns so that each contributes
    about as many tokens. The first ``microbatches * micro_batch_size * dp_size`` packed rows are the held-out set, no
    matter how they are dealt to ranks; a smaller split is repeated. After `microbatches` steps it starts over.

    Args:
        blend, config, shape, tokenizer, seq_length, micro_batch_size, dp_rank, dp_size, quarantine: as for
            `MicrobatchLoader`.
        microbatches: microbatches of one evaluation on one rank: evaluation steps times microbatches per step.

    Attributes:
        rows: distinct rows of the set, those of all ranks.
        modalities: kinds of samples in the set, the same on all ranks.

    Raises:
        DataFeedError: the split holds no usable sample.
    """

    def __init__(
        self,
        blend: str | Path,
        config: DataConfig,
        shape: MediaShape,
        tokenizer: str | Path,
        seq_length: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        microbatches: int,
        quarantine: Path | None = None,
    ) -> None:
        self.ledger = FaultLedger(config.data_error_budget, config.data_error_rate)
        self._encoder = DocumentEncoder(config, shape, Vocabulary(tokenizer), seq_length, Quarantine(quarantine))
        self._pad_id = self._encoder.vocabulary.special["<|pad|>"]
        needed = microbatches * micro_batch_size * dp_size
        rows = self._rows(blend, config, needed)
        if not rows:
            raise DataFeedError(f"the val split of {blend} holds no usable sample; set --eval-iters 0 or hold data out")
        self.rows = min(len(rows), needed)
        rows = [rows[index % len(rows)] for index in range(needed)]
        present = {planned.sample_modality for row in rows for planned in row}
        self.modalities = tuple(name for name, code in MODALITY_CODES.items() if code in present)
        mine = [(step * dp_size + dp_rank) * micro_batch_size for step in range(microbatches)]
        self._microbatches = [rows[start : start + micro_batch_size] for start in mine]
        self._position = 0

    def __iter__(self) -> "ValidationLoader":
        return self

    def __next__(self) -> Microbatch:
        """The next held-out microbatch (see `microbatch.FIELDS`)."""
        rows = [[sample for planned in row for sample in self._decode(planned)] for row in self._next_rows()]
        seq_length, shape = self._encoder.limits[0], self._encoder.shape
        arrays = [assemble_row(row, seq_length, shape, self._pad_id) for row in rows]
        return collate(arrays, [[sample.__key__ for sample in row] for row in rows])

    def _next_rows(self) -> list[list[Planned]]:
        rows = self._microbatches[self._position]
        self._position = (self._position + 1) % len(self._microbatches)
        return rows

    def _decode(self, planned: Planned) -> list[Planned]:
        try:
            return [self._encoder.decode(planned)]
        except SampleError as error:
            self.ledger.handle(error, planned, planned.__sources__)
            return []

    def _rows(self, blend: str | Path, config: DataConfig, needed: int) -> list[list[Planned]]:
        alone = WorkerConfig(rank=0, world_size=1, num_workers=0)
        streams = [self._samples(entry.dataset, config) for entry in open_blend(blend, "val", config, alone).datasets]
        samples: list[Planned] = []
        tokens = dict.fromkeys(range(len(streams)), 0)
        # One row more than needed: best fit leaves the last one badly filled.
        missing = (needed + 1) * self._encoder.limits[0]
        while tokens and missing > 0:
            turn = min(tokens, key=tokens.__getitem__)
            if (sample := next(streams[turn], None)) is None:
                del tokens[turn]
                continue
            samples.append(sample)
            tokens[turn] += sample.size[0]
            missing -= sample.size[0]
        packed = pack_rows([sample.size for sample in samples], self._encoder.limits)
        rows = [[samples[index] for index in row] for row in packed]
        order = row_order([[sample.__key__ for sample in row] for row in rows])
        return [rows[index] for index in order]

    def _samples(self, dataset: Any, config: DataConfig) -> Iterator[Planned]:
        inner = ShardInfosITarReader(dataset.path, dataset.shards)
        reader = ShardReader(inner, config.data_storage_retries, config.data_storage_backoff)
        for index in range(len(reader)):
            crude = reader[index]
            self.ledger.count_sample()
            try:
                yield from self._encoder.plan(cook(dataset.subflavors["kind"], crude))
            except SampleError as error:
                self.ledger.handle(error, crude, crude["__sources__"])
