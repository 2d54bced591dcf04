"""Sources by the name that a corpus YAML gives as `type`."""

from megatron_anyexperts.data.build.sources.base import Source
from megatron_anyexperts.data.build.sources.folders import AudioFolder, ImageFolder, TextFolder, VideoFolder

SOURCES: dict[str, type[Source]] = {
    source.type: source for source in (TextFolder, ImageFolder, AudioFolder, VideoFolder)
}
