#!/usr/bin/env python3
"""Fetch the raw data of the demo: captioned pictures, recorded speech and prose, all real.

Pictures, captions and speech come from Debian's package tuxpaint-stamps-default: `apt-get download` and
`dpkg-deb -x` need no root. Prose comes from the Python that runs this script: pydoc topics and the docstrings of
the standard library.

Result, moved into place only when complete:
    images/<topic>/<name>.png + <name>.json     captions by language, {"en": "A lion.", "fr": ...}
    speech/<language>/<topic>/<name>.ogg + .txt  what is said
    text/{topics,docstrings}/<name>.txt          one document each
    video/<number>.mp4 + <number>.json           with --videos: the camera moves over a picture, captions as above
    SOURCE.json                                  where it came from, how much there is
"""

import argparse
import ast
import json
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

PACKAGE = "tuxpaint-stamps-default"
STAMPS = Path("usr/share/tuxpaint/stamps")


def download_stamps(work: Path) -> Path:
    """Download and unpack the stamps package below `work`; return the folder of the stamps.

    Raises:
        RuntimeError: apt or dpkg is missing, or the download failed; the message says which.
    """
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise RuntimeError(f"{tool} is not on this machine")
    # A list of packages of our own lets this work without root where the system's list is empty.
    for name in ("state/lists/partial", "cache/archives/partial"):
        (work / name).mkdir(parents=True)
    own_lists = ["-o", f"Dir::State={work}/state", "-o", f"Dir::Cache={work}/cache"]
    own_lists += ["-o", "Dir::State::status=/var/lib/dpkg/status"]
    download = ["download", PACKAGE]
    if _apt(work, download) and (_apt(work, [*own_lists, "update"]) or _apt(work, [*own_lists, *download])):
        raise RuntimeError(f"apt-get download {PACKAGE} failed")
    [archive] = work.glob("*.deb")
    subprocess.run(["dpkg-deb", "-x", str(archive), str(work / "unpacked")], check=True)
    return work / "unpacked" / STAMPS


def _apt(work: Path, arguments: list[str]) -> int:
    command = ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", *arguments]
    return subprocess.run(command, cwd=work, stderr=subprocess.DEVNULL).returncode


def read_captions(path: Path) -> dict[str, str]:
    """Captions by language of a stamp's text file: English first, then lines `fr.utf8=...`."""
    first, *others = path.read_text(encoding="utf-8").splitlines() or [""]
    captions = {"en": first.strip()}
    for line in others:
        code, separator, caption = line.partition(".utf8=")
        if separator:
            captions[code.strip()] = caption.strip()
    return {code: caption for code, caption in captions.items() if caption}


def copy_stamps(stamps: Path, output: Path, counts: Counter) -> None:
    """Lay the stamps out as `images` and `speech`; count what is taken and what is left."""
    for text in sorted(stamps.rglob("*.txt")):
        captions = read_captions(text)
        name = text.relative_to(stamps).with_suffix("")
        image = text.with_suffix(".png")
        if image.is_file():
            target = output / "images" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(image, target.parent / image.name)
            sidecar = json.dumps(captions, ensure_ascii=False, indent=1)
            (target.parent / f"{name.name}.json").write_text(sidecar, encoding="utf-8")
            counts["images"] += 1
        elif text.with_suffix(".svg").is_file():
            counts["SVG pictures left out"] += 1
        for speech in sorted(text.parent.glob(f"{name.name}_desc*.ogg")):
            suffix = speech.stem.removeprefix(f"{name.name}_desc")
            language = suffix.removeprefix("_") or "en"
            if (suffix and not suffix.startswith("_")) or language not in captions:
                counts["recordings without a written text left out"] += 1
                continue
            target = output / "speech" / language / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(speech, target.parent / f"{name.name}.ogg")
            (target.parent / f"{name.name}.txt").write_text(captions[language], encoding="utf-8")
            counts["recordings"] += 1


def write_prose(output: Path, counts: Counter) -> None:
    """Write pydoc's topics and one document per standard library module made of its docstrings."""
    documents = {f"topics/{name}": text for name, text in topics.items()}
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library).with_suffix("")
        if {"test", "tests", "site-packages", "idlelib", "pydoc_data", "__pycache__"} & set(name.parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        docstrings = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
        text = "\n\n".join(filter(None, docstrings))
        if len(text) >= 400:
            documents["docstrings/" + ".".join(name.parts)] = text
    for name, text in documents.items():
        target = output / "text" / f"{name}.txt"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text.strip() + "\n", encoding="utf-8")
    counts["documents"] += len(documents)


def write_fallback_images(output: Path, counts: Counter) -> None:
    """Scanned digits (scikit-learn, where installed) and rendered lines of prose, each with a caption."""
    from PIL import Image, ImageDraw, ImageFont

    folder = output / "images"
    folder.mkdir(parents=True)
    pictures = []
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        print("note: scikit-learn is not installed; without its scanned digits all pictures are rendered text")
    else:
        words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
        digits = load_digits()
        for pixels, digit in zip(digits.images, digits.target, strict=True):
            image = Image.fromarray(255 - (pixels * 255 / 16).astype("uint8")).resize((96, 96))
            pictures.append((image, f"A handwritten digit, {words[digit]}."))
    font = ImageFont.load_default(size=16)
    lines = sorted({line.strip() for text in topics.values() for line in text.splitlines()})
    for line in [line for line in lines if 12 <= len(line) <= 40 and line.isascii()][:800]:
        image = Image.new("L", (360, 32), 255)
        ImageDraw.Draw(image).text((4, 6), line, fill=0, font=font)
        pictures.append((image, line))
    for index, (image, caption) in enumerate(pictures):
        image.save(folder / f"{index:05d}.png")
        (folder / f"{index:05d}.json").write_text(json.dumps({"en": caption}), encoding="utf-8")
    counts["images"] += len(pictures)


def write_videos(output: Path, number: int, counts: Counter) -> None:
    """Encode short videos in which the camera moves closer to a picture, with the picture's captions."""
    from fractions import Fraction

    import av
    from PIL import Image

    folder, frames, side = output / "video", 12, 96
    folder.mkdir()
    for index, path in enumerate(sorted((output / "images").rglob("*.png"))[:number]):
        with Image.open(path) as picture:
            rgba = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        with av.open(str(folder / f"{index:05d}.mp4"), "w", container_options={"fflags": "+bitexact"}) as video:
            stream = video.add_stream("mpeg4", rate=8, options={"threads": "1", "flags": "+bitexact"})
            stream.width = stream.height = side
            stream.pix_fmt = "yuv420p"
            for step in range(frames):
                margin = [round(size * 0.3 * step / frames) for size in picture.size]
                box = (*margin, picture.width - margin[0], picture.height - margin[1])
                frame = av.VideoFrame.from_image(picture.resize((side, side), box=box))
                frame.pts, frame.time_base = step, Fraction(1, 8)
                video.mux(stream.encode(frame))
            video.mux(stream.encode(None))
        shutil.copyfile(path.with_suffix(".json"), folder / f"{index:05d}.json")
        counts["videos"] += 1


def fetch(output: Path, offline: bool, videos: int) -> dict:
    """Fill `output` unless it is complete already; return the content of its SOURCE.json."""
    source = output / "SOURCE.json"
    if source.is_file():
        print(f"{output} is complete already: nothing to fetch")
        return json.loads(source.read_text())
    if output.exists() and any(output.iterdir()):
        raise SystemExit(f"error: {output} exists but was not made by this script; choose another --output")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".demo-data-", dir=output.parent) as work_name:
        work, counts = Path(work_name), Counter()
        result = work / "result"
        result.mkdir()
        origin = f"Debian package {PACKAGE} and the prose of Python {sys.version.split()[0]}"
        try:
            if offline:
                raise RuntimeError("--offline was given")
            copy_stamps(download_stamps(work), result, counts)
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            print(f"FALLBACK: Debian's pictures and speech are not available ({error}).")
            print("FALLBACK: using scanned digits and rendered text from Python packages; there is NO SPEECH in it.")
            shutil.rmtree(result)
            counts.clear()
            write_fallback_images(result, counts)
            origin = f"fallback from Python packages: digits, rendered text, prose of Python {sys.version.split()[0]}"
        write_prose(result, counts)
        if videos:
            write_videos(result, videos, counts)
        summary = {"origin": origin, "counts": dict(counts)}
        (result / "SOURCE.json").write_text(json.dumps(summary, indent=1))
        if output.exists():
            output.rmdir()
        result.rename(output)
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to create; reused when complete")
    parser.add_argument("--offline", action="store_true", help="do not try the network: make the fallback data at once")
    parser.add_argument("--videos", type=int, default=0, help="videos to make of the pictures (default: 0)")
    args = parser.parse_args()
    summary = fetch(args.output, args.offline, args.videos)
    print(f"{args.output}: {summary['origin']}")
    for name, count in summary["counts"].items():
        print(f"  {count:6d} {name}")


if __name__ == "__main__":
    main()
