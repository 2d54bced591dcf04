"""Sources by the name that a corpus YAML gives as `type`."""

from megatron_anyexperts.data.build.sources.base import Source
from megatron_anyexperts.data.build.sources.chat import Chat
from megatron_anyexperts.data.build.sources.folders import AudioFolder, ImageFolder, TextFolder, VideoFolder
from megatron_anyexperts.data.build.sources.records import Interleaved, MediaTable, TextTable
from megatron_anyexperts.data.build.sources.tars import WebDataset

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
