"""Convert weights of released language models between Hugging Face and this project's checkpoints.

    anyexperts convert import --hf DIR --output CHECKPOINT
    anyexperts convert export --run-dir RUN --hf-config CHECKPOINT/hf/config.json --output DIR

docs/conversion.md lists the families. One process without a GPU; memory holds one tensor on import and one layer on
export. Exit code 2: refused, with a list of the tensors that do not fit.
"""

import argparse
import sys
from pathlib import Path

from megatron_anyexperts.survival.run_directory import Run
from megatron_anyexperts.training.arguments import UsageError
from megatron_anyexperts.weights.conversion import import_weights
from megatron_anyexperts.weights.export import export_weights
from megatron_anyexperts.weights.released import FOLDER


def parser() -> argparse.ArgumentParser:
    """The flags of this command."""
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = own.add_subparsers(dest="command", required=True)
    importing = commands.add_parser("import", help="Hugging Face directory to checkpoint")
    importing.add_argument(
        "--hf", type=Path, required=True, help="directory with config.json and *.safetensors, or a GGUF file"
    )
    importing.add_argument(
        "--add-tokens",
        action="store_true",
        help="add the tokens of media and chat that its tokenizer lacks, and rows for them: the mean of the others",
    )
    exporting = commands.add_parser("export", help="checkpoint to Hugging Face directory")
    source = exporting.add_mutually_exclusive_group(required=True)
    source.add_argument("--run-dir", type=Path, help="run directory; its newest checkpoint is taken")
    source.add_argument("--load", type=Path, help="checkpoint directory instead")
    exporting.add_argument(
        "--hf-config",
        type=Path,
        help="config.json of the architecture; tokenizer and settings of generation beside it are copied; default: "
        "what an import left in the checkpoint directory",
    )
    for command in (importing, exporting):
        command.add_argument("--output", "--save", dest="save", type=Path, required=True, help="new directory")
    return own


def main(cli: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    chosen = parser().parse_args(cli)
    try:
        if chosen.command == "import":
            import_weights(chosen.hf, chosen.save, chosen.add_tokens)
            print(f"checkpoint: {chosen.save} (use --load; the model's flags are in {chosen.save / 'model.yaml'})")
        else:
            source = chosen.load or Run(chosen.run_dir).checkpoints
            files = export_weights(source, chosen.hf_config or source / FOLDER / "config.json", chosen.save)
            print(f"{len(files)} weight files: {chosen.save}")
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
