"""Convert weights between Hugging Face and this project's checkpoints.

    anyexperts convert import --hf DIR --output CHECKPOINT
    anyexperts convert export --run-dir RUN --hf-config CHECKPOINT/hf/config.json --output DIR
    anyexperts convert export --run-dir RUN --output DIR

The second form writes a released architecture; docs/conversion.md lists them. The third writes everything that is
trained here, as a model of transformers with code of its own. One process without a GPU; memory holds one tensor on
import and one layer on export. Exit code 2: refused, with a list of the tensors that do not fit.
"""

import argparse
import sys
from pathlib import Path

from megatron_anyexperts.analysis.model_card import model_card
from megatron_anyexperts.analysis.run_record import NoRun, RunRecord
from megatron_anyexperts.survival.run_directory import Run
from megatron_anyexperts.training.arguments import UsageError
from megatron_anyexperts.weights.conversion import import_weights
from megatron_anyexperts.weights.export import export_weights
from megatron_anyexperts.weights.hub_export import export_own
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
        help="config.json of a released architecture; tokenizer and settings of generation beside it are copied; "
        "default: what an import left in the checkpoint directory. Without one the model goes out with its own code",
    )
    exporting.add_argument(
        "--tokenizer-model",
        type=Path,
        metavar="DIR",
        help="tokenizer of a model that goes out with its own code (default: that of the run)",
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
            print(f"{len(_export(chosen))} weight files: {chosen.save}")
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _export(chosen: argparse.Namespace) -> list[Path]:
    source = chosen.load or Run(chosen.run_dir).checkpoints
    config = chosen.hf_config or source / FOLDER / "config.json"
    if chosen.hf_config or config.is_file():
        if chosen.tokenizer_model:
            raise UsageError(
                f"--tokenizer-model goes with a model's own code; a released architecture takes the one beside {config}"
            )
        return export_weights(source, config, chosen.save)
    try:
        record = RunRecord.read(chosen.run_dir) if chosen.run_dir else None
    except NoRun as error:
        raise UsageError(str(error)) from error
    tokenizer = chosen.tokenizer_model or (record and record.config.get("tokenizer-model"))
    if tokenizer is None:
        raise UsageError("name the directory of the model's tokenizer with --tokenizer-model")
    files = export_own(source, Path(tokenizer), chosen.save)
    (chosen.save / "README.md").write_text(model_card(chosen.save.name, record), encoding="utf-8")
    return files
