"""Forms of media that can be read, and how to tell them by their first bytes: one table for builder and loader.

The form is taken from the bytes, never from a name alone. FFmpeg is told the container it may use: left to guess, it
would accept play lists, which make it open further files.
"""

IMAGE_FORMATS = {
    "PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif",
}  # fmt: skip
"""Pillow's name -> extension of the member in a shard. MPO is a JPEG with further pictures behind the first."""

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")

VIDEO_DEMUXERS = {"mp4": "mp4", "m4v": "mp4", "mov": "mov", "mkv": "matroska", "webm": "matroska", "avi": "avi"}
AUDIO_DEMUXERS = VIDEO_DEMUXERS | {
    "ogg": "ogg", "oga": "ogg", "opus": "ogg", "wav": "wav", "flac": "flac", "mp3": "mp3", "m4a": "mp4", "aac": "aac",
}  # fmt: skip
"""Extension -> FFmpeg demuxer. Sound is taken from files with a picture as well."""

_FORMS = "Ogg, WAV, RF64, FLAC, MP3, AAC (ADTS), MP4, M4A, MOV, Matroska, WebM, AVI"
_ISO_ATOMS = (b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"moof", b"styp")


class MediaError(ValueError):
    """A medium that cannot be used.

    Args:
        reason: a short constant phrase, used for counting.
        detail: the values and limits of this case.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


def brief(error: BaseException) -> str:
    """An exception in one line of at most 200 characters."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def stream_form(data: bytes, extension: str = "") -> tuple[str, str]:
    """Extension and FFmpeg demuxer of a sound or video file.

    Args:
        data: the file.
        extension: that it claims to have; believed only where the bytes say nothing.

    Raises:
        MediaError: none that is known.
    """
    found = _by_content(data) or extension
    if found not in AUDIO_DEMUXERS:
        raise MediaError("unknown media format", f"begins with {data[:12]!r}; known are {_FORMS}")
    return found, AUDIO_DEMUXERS[found]


def _by_content(data: bytes) -> str:
    start, four = data[:12], data[:4]
    if four == b"OggS":
        return "ogg"
    if four in (b"RIFF", b"RF64", b"BW64") and start[8:] == b"WAVE":
        return "wav"
    if four == b"RIFF" and start[8:] == b"AVI ":
        return "avi"
    if four == b"\x1aE\xdf\xa3":
        return "webm" if b"webm" in data[:64] else "mkv"
    if start[4:8] == b"ftyp":
        return {b"qt  ": "mov", b"M4A ": "m4a", b"M4B ": "m4a", b"M4V ": "m4v"}.get(start[8:], "mp4")
    if start[4:8] in _ISO_ATOMS:  # QuickTime before 2001, and files of cameras that were cut short
        return "mov"
    return _by_audio_frame(data)


def _by_audio_frame(data: bytes) -> str:
    at, tagged = 0, False
    while data[at : at + 3] == b"ID3" and len(data) > at + 10:
        size = 0
        for digit in data[at + 6 : at + 10]:
            size = size << 7 | digit & 0x7F
        at, tagged = at + 10 + size + (10 if data[at + 5] & 0x10 else 0), True
    while tagged and data[at : at + 1] == b"\0":  # padding behind the tag
        at += 1
    if data[at : at + 4] == b"fLaC":
        return "flac"
    head = data[at : at + 4]
    if len(head) == 4 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0:
        if head[1] & 0xF6 == 0xF0:
            return "aac"
        version, layer = head[1] >> 3 & 3, head[1] >> 1 & 3
        if version != 1 and layer and head[2] >> 4 != 15 and head[2] >> 2 & 3 != 3:
            return "mp3"  # MPEG 1, 2 or 2.5, with a checksum or without
    return "mp3" if tagged else ""
