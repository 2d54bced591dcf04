"""Ask a trained model something, or score its answers to held-out questions.

    anyexperts generate --config CONFIG --run-dir RUN --prompt "Which object is in this picture?" --image X.png
    anyexperts generate --config CONFIG --load CHECKPOINTS --evaluate [--examples 2] [flags of the training]

Prints the answer and, for each token that was read, the expert slots it got (mean over the layers). One process.
"""

import argparse
import json
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from megatron_anyexperts.console import Parser, own_lines_only, say
from megatron_anyexperts.evaluation.trained_model import load_model, start
from megatron_anyexperts.training.arguments import UsageError


def why_empty(generated) -> str:
    """What to show in the place of an answer without text."""
    if generated.answer:
        return f"(empty: none of its {len(generated.answer)} tokens is text)"
    if generated.stop:
        return f"(empty: the first token was {generated.stop}, the end of an answer)"
    return "(empty: --max-new-tokens asked for none)"


def show(generated, as_json: bool) -> None:
    """Print an answer and the slots of every token, placeholders of one medium summed up."""
    if as_json:
        say(json.dumps(asdict(generated)))
        return
    say(f"answer: {generated.text if generated.text.strip() else why_empty(generated)}")
    say("slots per token:")
    for name, tokens in (("prompt", generated.prompt), ("answer", generated.answer)):
        words = [f"{token.text!r} {'-' if token.slots is None else f'{token.slots:.2f}'}" for token in tokens]
        say(f"  {name}: {'  '.join(words)}")


def parser() -> argparse.ArgumentParser:
    """The flags of this command; all others go to Megatron's parser."""
    own = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    own.add_argument("--prompt", help="the user's question")
    for kind in ("image", "audio", "video"):
        own.add_argument(f"--{kind}", type=Path, action="append", default=[], help=f"{kind} file before the question")
    own.add_argument("--max-new-tokens", type=int, default=32, help="longest answer (default: 32)")
    own.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token (default)")
    own.add_argument("--sampling-seed", type=int, default=0, help="seed of sampled answers (default: 0)")
    own.add_argument("--evaluate", action="store_true", help="score the conversations held out in --data-path")
    own.add_argument("--json", action="store_true", help="print JSON")
    own.add_argument("--examples", type=int, default=0, help="with --evaluate: answers to print per task")
    own.add_argument("--masks", type=Path, help="with --evaluate: where importance falls, by this .masks.jsonl")
    own.add_argument("--other-pictures", action="store_true", help="with --evaluate: also with exchanged pictures")
    return own


def evaluate(args: argparse.Namespace, model, own: argparse.Namespace) -> None:
    """Print the scores of each task, and decoded answers."""
    from megatron_anyexperts.data.informative import read_masks
    from megatron_anyexperts.evaluation.answers import AnswerScorer, score_table, together, with_other_pictures
    from megatron_anyexperts.evaluation.generation import generate, up_to_answer
    from megatron_anyexperts.evaluation.informative import semantics, semantics_table
    from megatron_anyexperts.evaluation.slot_gain import gains_text, slot_gains

    scorer = AnswerScorer.from_args(args)
    if not scorer.questions:
        raise UsageError(f"{args.data_path} holds out no conversation; name a blend of chat shards")
    shown: Counter[str] = Counter()
    for question in scorer.questions:
        shown[question.task] += 1
        if shown[question.task] <= own.examples:
            planned, vocabulary = question.planned, scorer.encoder.vocabulary
            answer = generate(model, scorer.encoder, up_to_answer(question.document), own.max_new_tokens)
            expected = vocabulary.decode(planned.tokens[planned.target].tolist()).partition("<|im_end|>")[0]
            say(f"{question.task}: expected {expected!r}, answered {answer.text!r}")
    scores, shuffled, layers, gains = scorer(model), None, None, {}
    if own.other_pictures:
        questions = with_other_pictures(scorer.questions)
        shuffled = AnswerScorer(scorer.encoder, questions, scorer.micro_batch_size)(model)
    if own.masks:
        known = (model, scorer.encoder, scorer.questions, read_masks(own.masks))
        layers = semantics(*known)
        if args.anyexperts_k_min != args.anyexperts_k_max:
            gains = slot_gains(*known)
    if own.json:
        named = {"all": together(scores)} | ({"all, other pictures": together(shuffled)} if shuffled else {})
        tables = {"tasks": scores, "tasks, other pictures": shuffled or {}, "layers": layers or {}, "slots": gains}
        content = {name: {key: asdict(one) for key, one in table.items()} for name, table in tables.items()}
        say(json.dumps({name: asdict(one) for name, one in named.items()} | content))
        return
    say(f"checkpoint: {args.load}, iteration {args.iteration}\n{score_table(scores, shuffled)}")
    if layers:
        say(semantics_table(layers))
    if gains:
        say(gains_text(gains))


@own_lines_only
def main(cli: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    own, rest = parser().parse_known_args(cli)
    if own.evaluate == (own.prompt is not None):
        parser().error("give either --prompt or --evaluate")
    try:
        args = start(rest)
        if args.world_size > 1:
            raise UsageError(f"{args.world_size} processes: run this command in one, checkpoints fit any layout")
        if args.anyexperts_dispatch_eps is not None:
            # Who is over the cap depends on all tokens of a step: a token's output would depend on later ones.
            print("note: the dispatch cap is not causal; generation runs without it", file=sys.stderr)
            args.anyexperts_dispatch_eps = None
        model = load_model(args)
        if own.evaluate:
            evaluate(args, model, own)
            return 0
        from megatron_anyexperts.evaluation.answers import document_encoder
        from megatron_anyexperts.evaluation.generation import generate, media_file, prompt_document

        media = [media_file(path, kind) for kind in ("image", "audio", "video") for path in getattr(own, kind)]
        document = prompt_document(own.prompt, media)
        sampling = (own.max_new_tokens, own.temperature, own.sampling_seed)
        show(generate(model, document_encoder(args), document, *sampling), own.json)
    except (UsageError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
