"""Sources by the name that a corpus YAML gives as `type`."""

from megatron_anyexperts.corpus.sources.base import Source
from megatron_anyexperts.corpus.sources.chat import Chat
from megatron_anyexperts.corpus.sources.folders import AudioFolder, ImageFolder, TextFolder, VideoFolder
from megatron_anyexperts.corpus.sources.records import Interleaved, MediaTable, TextTable
from megatron_anyexperts.corpus.sources.tars import WebDataset

SOURCES: dict[str, type[Source]] = {
    source.type: source
    for source in (
        TextFolder,
        ImageFolder,
        AudioFolder,
        VideoFolder,
        TextTable,
        MediaTable,
        Interleaved,
        Chat,
        WebDataset,
    )
}
