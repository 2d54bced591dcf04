"""Memory, traffic, time and cost of a training before it is submitted, and the layout that would be fastest.

    anyexperts plan --config ling_mini_2_0_anyexperts --nodes 8 --tokens 2e11 --price-per-gpu-hour 2.5

Nothing is built and no GPU is needed: all figures are formulas over the configuration, with efficiencies that are
assumed, the same for all models (docs/planning.md has them beside published runs). Every other flag is one of training
and overrides the configuration. Exit code 0: the configuration's layout fits; 1: it does not; 2: it cannot be planned.
"""

import argparse
import json
import math
import sys

from megatron_anyexperts.console import Parser, own_lines_only, say
from megatron_anyexperts.hardware import GPUS
from megatron_anyexperts.training.usage import UsageError


def parser() -> argparse.ArgumentParser:
    """The flags of this command; all others are those of training."""
    own = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    own.add_argument("--config", required=True, help="configuration to plan")
    own.add_argument("--nodes", type=int, required=True, help="nodes of eight GPUs")
    own.add_argument("--gpu", choices=GPUS, default="h100", help="default h100")
    own.add_argument("--tokens", type=float, help="tokens to train on: days and cost")
    own.add_argument("--price-per-gpu-hour", type=float, help="of one GPU, in whatever currency")
    own.add_argument("--vocabulary", type=int, help="rows of the embedding, where no tokenizer is named")
    own.add_argument("--document", type=int, help="tokens of a document (default: a whole row)")
    own.add_argument("--pictures", type=float, default=0.0, help="share of tokens that are of pictures (default 0)")
    own.add_argument("--write-gb-per-second", type=float, default=10.0, help="of the file system (default 10)")
    own.add_argument("--json", action="store_true", help="print JSON")
    return own


def refuse(own: argparse.Namespace) -> None:
    """Refuse values that mean nothing.

    Raises:
        UsageError: names the flag and the value.
    """
    for name in ("nodes", "tokens", "price_per_gpu_hour", "vocabulary", "document", "write_gb_per_second"):
        value = getattr(own, name)
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"--{name.replace('_', '-')} {value} must be above 0")
    if not 0 <= own.pictures <= 1:
        raise UsageError(f"--pictures {own.pictures} must be a share, from 0 to 1")
    if own.price_per_gpu_hour and not own.tokens:
        raise UsageError("--price-per-gpu-hour needs --tokens: what is to be paid for?")


@own_lines_only
def main(cli: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    own, flags = parser().parse_known_args(cli)
    from megatron_anyexperts.checks.plan_config import question
    from megatron_anyexperts.checks.plan_report import plan, text
    from megatron_anyexperts.checks.plan_search import examine, search

    try:
        refuse(own)
        asked = question(own, flags)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    mine = examine(asked.setting, asked.layout)
    answer = plan(asked, search(asked.setting, asked.layout), mine, own)
    say(json.dumps(answer, indent=2) if own.json else text(answer))
    return 1 if mine.reason else 0
