"""Ask a trained model something, or score its answers to held-out questions.

    python pretrain/generate.py --config CONFIG --run-dir RUN --prompt "Which object is in this picture?" --image X.png
    python pretrain/generate.py --config CONFIG --load CHECKPOINTS --evaluate [--examples 2] [flags of the training]

Prints the answer and, for each token that was read, the expert slots it got (mean over the layers). One process.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

from megatron_anyexperts.evaluation.trained_model import load_model, start
from megatron_anyexperts.training.arguments import UsageError


def show(generated) -> None:
    """Print an answer and the slots of every token, placeholders of one medium summed up."""
    print(f"answer: {generated.text}")
    print("slots per token:")
    for name, tokens in (("prompt", generated.prompt), ("answer", generated.answer)):
        words = [f"{token.text!r} {'-' if token.slots is None else f'{token.slots:.2f}'}" for token in tokens]
        print(f"  {name}: {'  '.join(words)}")


def parse_own(cli: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """This command's own flags, and the rest, which are those of training."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--prompt", help="the user's question")
    for kind in ("image", "audio", "video"):
        parser.add_argument(
            f"--{kind}", type=Path, action="append", default=[], help=f"{kind} file before the question"
        )
    parser.add_argument("--max-new-tokens", type=int, default=32, help="longest answer (default: 32)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token (default)")
    parser.add_argument("--sampling-seed", type=int, default=0, help="seed of sampled answers (default: 0)")
    parser.add_argument("--evaluate", action="store_true", help="score the conversations held out in --data-path")
    parser.add_argument("--examples", type=int, default=0, help="with --evaluate: answers to print per task")
    own, rest = parser.parse_known_args(cli)
    if own.evaluate == (own.prompt is not None):
        parser.error("give either --prompt or --evaluate")
    return own, rest


def evaluate(args: argparse.Namespace, model, own: argparse.Namespace) -> None:
    """Print the scores of each task, and decoded answers."""
    from megatron_anyexperts.evaluation.answers import AnswerScorer, score_table
    from megatron_anyexperts.evaluation.generation import generate, up_to_answer

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
            print(f"{question.task}: expected {expected!r}, answered {answer.text!r}")
    print(f"checkpoint: {args.load}, iteration {args.iteration}\n{score_table(scorer(model))}")


def main() -> int:
    own, rest = parse_own(sys.argv[1:])
    try:
        args = start(rest)
        if args.world_size > 1:
            raise UsageError(f"{args.world_size} processes: run this command in one, checkpoints fit any layout")
        if args.anyexperts_dispatch_eps is not None:
            # Who is over the cap depends on all tokens of a step: a token's output would depend on later ones.
            print("note: the dispatch cap is not causal; generation runs without it")
            args.anyexperts_dispatch_eps = None
        model = load_model(args)
        if own.evaluate:
            evaluate(args, model, own)
            return 0
        from megatron_anyexperts.evaluation.answers import document_encoder
        from megatron_anyexperts.evaluation.generation import generate, media_file, prompt_document

        media = [media_file(path, kind) for kind in ("image", "audio", "video") for path in getattr(own, kind)]
        document = prompt_document(own.prompt, media)
        show(generate(model, document_encoder(args), document, own.max_new_tokens, own.temperature, own.sampling_seed))
    except (UsageError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
