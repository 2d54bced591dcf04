"""Generates text token by token, with cached keys and values and the routing of training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.utils import InferenceMode

from megatron_anyexperts.data.chat import chat_parts
from megatron_anyexperts.data.cookers import EXTENSIONS
from megatron_anyexperts.data.encode import DocumentEncoder
from megatron_anyexperts.data.microbatch import LOGIT_INPUTS, collate
from megatron_anyexperts.data.packing import assemble_row
from megatron_anyexperts.data.samples import Document, Media, Planned, Text
from megatron_anyexperts.evaluation.known_tokens import KnownTokens
from megatron_anyexperts.evaluation.without_fp8 import without_fp8
from megatron_anyexperts.moe.metrics import record_tokens

STOPS = ("<|im_end|>", "<|endoftext|>")


@dataclass(frozen=True)
class GeneratedToken:
    """One token.

    Attributes:
        token: its id.
        text: what it stands for.
        slots: expert slots that it got when it was read, mean over the mixture layers; None if nothing read it,
            as is the case for the last one.
    """

    token: int
    text: str
    slots: float | None


@dataclass(frozen=True)
class Generated:
    """A prompt's tokens and those generated after it; the stop token that ended them is named apart."""

    prompt: list[GeneratedToken]
    answer: list[GeneratedToken]
    text: str
    stop: str | None = None


def media_file(path: Path, modality: str) -> Media:
    """Read an image, audio or video file.

    Raises:
        ValueError: the extension is not one of the modality's formats, or the file cannot be read.
    """
    extension = path.suffix.lower().removeprefix(".")
    if extension not in EXTENSIONS[modality]:
        raise ValueError(f"{path}: not one of the {modality} formats {', '.join(EXTENSIONS[modality])}")
    try:
        return Media(modality, path.read_bytes(), extension)
    except OSError as error:
        raise ValueError(f"the {modality} {path} cannot be read: {error.strerror}") from error


def prompt_document(text: str, media: list[Media]) -> Document:
    """A user's turn, media first, up to where the assistant answers."""
    items = [{"type": medium.modality, "medium": medium} for medium in media] + [{"type": "text", "text": text}]
    messages = [{"role": "user", "content": items}, {"role": "assistant", "content": "?"}]
    whole = Document(
        __key__="prompt",
        __restore_key__=(),
        __subflavors__={},
        kind="chat",
        parts=chat_parts(messages, lambda item: item["medium"]),
    )
    return up_to_answer(whole)


def up_to_answer(document: Document) -> Document:
    """The part of a conversation before its first answer."""
    first = next(index for index, part in enumerate(document.parts) if isinstance(part, Text) and part.target)
    return Document(
        __key__=document.__key__,
        __restore_key__=document.__restore_key__,
        __subflavors__=document.__subflavors__,
        kind=document.kind,
        parts=document.parts[:first],
    )


def decode(
    model: torch.nn.Module,
    encoder: DocumentEncoder,
    prompt: Planned,
    max_new_tokens: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield new tokens, each with the logits fp32 [V] it was chosen from, -inf where there is no token.

    1. Prefill: the prompt in one pass, with its media.
    2. Each new token in a pass of its own, which reads the cached keys and values of those before it.

    A model trained in FP8 computes without it here; see `without_fp8`.

    Args:
        model: whole, in evaluation mode, on one process.
        encoder: as in training.
        prompt: planned, from `prompt_document`; the end of text that planning appends is not part of the input.
        max_new_tokens: passes at most.
        temperature: 0 takes the most likely token.
        generator: of the samples.

    Raises:
        ValueError: prompt and new tokens exceed the sequence length.
    """
    length, limit = prompt.size[0], encoder.limits[0]
    if length + max_new_tokens > limit:
        raise ValueError(
            f"a prompt of {length} tokens and {max_new_tokens} new ones exceed seq_length={limit}; "
            "shorten the prompt, lower --max-new-tokens or --data-image-max-patches"
        )
    device = torch.device(torch.cuda.current_device())
    row = assemble_row([encoder.decode(prompt)], length, encoder.shape, encoder.vocabulary.special["<|pad|>"])
    inputs = collate([row], []).to(device).select(LOGIT_INPUTS)
    known = KnownTokens(encoder.vocabulary)
    with torch.no_grad(), InferenceMode.active(), without_fp8(model):
        context = StaticInferenceContext(1, length + max_new_tokens)
        for _ in range(max_new_tokens):
            logits_V = known(model(**inputs, inference_context=context, runtime_gather_output=True)[0, -1].float())
            token = choose(logits_V, temperature, generator)
            yield int(token), logits_V
            context.sequence_len_offset += inputs["tokens"].shape[1]
            position = torch.full((1, 1), context.sequence_len_offset, device=device)
            inputs = {"tokens": token.view(1, 1), "position_ids": position}


def choose(logits_V: torch.Tensor, temperature: float, generator: torch.Generator | None) -> torch.Tensor:
    """The next token, int64 []: the most likely one, or a sample of the softmax at `temperature`."""
    if temperature == 0:
        return logits_V.argmax()
    return torch.multinomial((logits_V / temperature).softmax(0), 1, generator=generator)[0]


def generate(
    model: torch.nn.Module,
    encoder: DocumentEncoder,
    document: Document,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> Generated:
    """Answer a prompt; see `decode`.

    Args:
        document: from `prompt_document` or `up_to_answer`.
        seed: of the samples; the same seed gives the same text.
    """
    vocabulary = encoder.vocabulary
    [planned] = encoder.plan(document)
    stops = {vocabulary.special[name]: name for name in STOPS}
    stop: str | None = None
    device = torch.device(torch.cuda.current_device())
    generator = torch.Generator(device).manual_seed(seed)
    answer: list[int] = []
    with record_tokens() as layers:
        for token, _ in decode(model, encoder, planned, max_new_tokens, temperature, generator):
            if (stop := stops.get(token)) is not None:
                break
            answer.append(token)
    slots = [torch.cat([record.slots_SB[:, 0] for record in records]).float() for records in layers.values()]
    mean = torch.stack(slots).mean(0).tolist() if slots else []
    tokens = planned.tokens[:-1].tolist() + answer
    parts = [
        GeneratedToken(token, vocabulary.decode([token]), mean[place] if place < len(mean) else None)
        for place, token in enumerate(tokens)
    ]
    return Generated(parts[: planned.size[0]], parts[planned.size[0] :], vocabulary.decode(answer), stop)
