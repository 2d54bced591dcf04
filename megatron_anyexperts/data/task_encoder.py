"""Energon's hooks around cooking, planning, packing and decoding; all logic lives in the pure functions they call."""

from collections.abc import Iterator
from typing import Any

from megatron.energon import SkipSample, TaskEncoder, stateless

from megatron_anyexperts.data.cookers import COOKERS
from megatron_anyexperts.data.encode import DocumentEncoder
from megatron_anyexperts.data.faults import FaultLedger
from megatron_anyexperts.data.microbatch import pack
from megatron_anyexperts.data.packing import assemble_row, pack_rows, row_order
from megatron_anyexperts.data.samples import Document, Planned, Row


class FeedTaskEncoder(TaskEncoder):
    """The stages of a stream: cook, shuffle, plan, pack, decode, assemble, collate.

    Media stay encoded until their row is about to be emitted, so that shuffling and packing buffers hold compressed
    bytes. Nothing here draws random numbers: what a sample becomes depends on the sample alone.
    """

    decoder = None  # Energon would decode before the shuffle buffer
    cookers = COOKERS

    def __init__(self, encoder: DocumentEncoder, ledger: FaultLedger) -> None:
        self.encoder = encoder
        self.ledger = ledger
        self._seq_length = encoder.limits[0]
        self._pad_id = encoder.vocabulary.special["<|pad|>"]

    @stateless
    def preencode_sample(self, document: Document) -> Iterator[Planned]:
        self.ledger.count_sample()
        yield from self.encoder.plan(document)

    @stateless
    def select_samples_to_pack(self, samples: list[Planned]) -> list[list[Planned]]:
        rows = [[samples[index] for index in row] for row in pack_rows([s.size for s in samples], self.encoder.limits)]
        return [rows[row] for row in row_order([[sample.__key__ for sample in row] for row in rows])]

    @stateless
    def postencode_sample(self, planned: Planned) -> Planned:
        return self.encoder.decode(planned)

    @stateless
    def pack_selected_samples(self, samples: list[Planned]) -> Row:
        if not samples:  # every sample of the row failed to decode
            raise SkipSample
        return Row(
            __key__=samples[0].__key__,
            __restore_key__=samples[0].__restore_key__,
            arrays=assemble_row(samples, self._seq_length, self.encoder.shape, self._pad_id),
            keys=[sample.__key__ for sample in samples],
        )

    @stateless
    def batch(self, rows: list[Row]) -> dict[str, Any]:
        return pack([row.arrays for row in rows], [row.keys for row in rows])
