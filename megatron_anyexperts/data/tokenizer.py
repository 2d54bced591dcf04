"""The tokenizer: a byte-level BPE trained on a corpus, or a Hugging Face one with our special tokens added."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL_TOKENS = {
    "pad": "<|pad|>",
    "end_of_text": "<|endoftext|>",
    "image": "<|image|>",
    "audio": "<|audio|>",
    "video": "<|video|>",
    "image_start": "<|image_start|>",
    "image_end": "<|image_end|>",
    "audio_start": "<|audio_start|>",
    "audio_end": "<|audio_end|>",
    "video_start": "<|video_start|>",
    "video_end": "<|video_end|>",
    "turn_start": "<|im_start|>",
    "turn_end": "<|im_end|>",
}
"""Role -> token. `image`, `audio` and `video` are the placeholders that encoder output replaces."""

CHAT_TEMPLATE = """\
{%- macro content(message) %}
{%- if message['content'] is string %}{{- message['content'] }}
{%- else %}
{%- for part in message['content'] %}
{%- if part['type'] == 'text' %}{{- part['text'] }}
{%- else %}{{- '<|' ~ part['type'] ~ '_start|><|' ~ part['type'] ~ '|><|' ~ part['type'] ~ '_end|>' }}
{%- endif %}
{%- endfor %}
{%- endif %}
{%- for call in message['tool_calls'] or [] %}
{%- set function = call['function'] or call %}
{{- '\n' if message['content'] or not loop.first }}
{{- '<tool_call>\n{"name": ' ~ function['name'] | tojson ~ ', "arguments": ' }}
{{- function['arguments'] if function['arguments'] is string else function['arguments'] | tojson }}
{{- '}\n</tool_call>' }}
{%- endfor %}
{%- endmacro %}
{%- for message in messages %}
{{- '<|im_start|>' ~ message['role'] ~ '\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{- content(message) ~ '<|im_end|>' }}{%- endgeneration %}
{%- else %}{{- content(message) ~ '<|im_end|>' }}
{%- endif %}
{{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
"""ChatML; one placeholder per medium, which the reader widens to the number of tokens the medium takes."""


def train_tokenizer(texts: Iterable[str], vocab_size: int, directory: Path) -> None:
    """Train a byte-level BPE and save it as a Hugging Face directory. The same texts give the same files.

    Args:
        texts: documents; any text can be encoded afterwards, since all bytes are in the alphabet.
        vocab_size: upper limit of the vocabulary, special tokens included; a small corpus gives fewer.
        directory: created.

    Raises:
        ValueError: `vocab_size` has no room for 256 bytes and the special tokens.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size={vocab_size} is below {smallest}: 256 bytes and {len(SPECIAL_TOKENS)} special tokens"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    _save(tokenizer, None, directory)


def adopt_tokenizer(source: Path, directory: Path) -> list[str]:
    """Copy a Hugging Face tokenizer directory, adding what is missing.

    Special tokens that are missing are added at the end of the vocabulary. The chat template becomes ours, which is how
    the feed writes conversations, unless there is one that writes the same.

    Returns:
        The tokens that were added.

    Raises:
        ValueError: `source` holds no tokenizer that has a fast (Rust) form.
    """
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(source, local_files_only=True)
        tokenizer = Tokenizer.from_str(loaded.backend_tokenizer.to_str())
    except Exception as error:  # transformers raises many types for many causes
        raise ValueError(f"{source} holds no usable Hugging Face tokenizer: {error}") from error
    missing = [token for token in SPECIAL_TOKENS.values() if tokenizer.token_to_id(token) is None]
    tokenizer.add_special_tokens(missing)
    _save(tokenizer, loaded.chat_template if _writes_as_we_do(loaded) else None, directory)
    return missing


_PROBE = [
    {"role": "user", "content": "a question"},
    {"role": "assistant", "content": "an answer"},
    {"role": "user", "content": "another"},
]


def _writes_as_we_do(tokenizer) -> bool:
    """Whether the chat template of a tokenizer of transformers gives what ours does for a short conversation."""
    try:
        texts = [
            tokenizer.apply_chat_template(_PROBE, tokenize=False, chat_template=template, add_generation_prompt=True)
            for template in (tokenizer.chat_template, CHAT_TEMPLATE)
        ]
    except Exception:  # a template may ask for anything
        return False
    return texts[0] == texts[1]


def _save(tokenizer: Tokenizer, chat_template: str | None, directory: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL_TOKENS["pad"],
        eos_token=SPECIAL_TOKENS["end_of_text"],
        additional_special_tokens=list(SPECIAL_TOKENS.values())[2:],
        chat_template=chat_template or CHAT_TEMPLATE,
    )
    fast.save_pretrained(directory)
