"""Text to token ids, with special tokens out of reach of the text itself."""

from pathlib import Path

from tokenizers import Tokenizer

from megatron_anyexperts.data.tokenizer import SPECIAL_TOKENS


class Vocabulary:
    """The tokenizer of a Hugging Face directory, as the feed uses it.

    Args:
        directory: holds ``tokenizer.json`` with every token of `SPECIAL_TOKENS`.

    Raises:
        FileNotFoundError: there is no ``tokenizer.json``.
        ValueError: special tokens are missing.
    """

    def __init__(self, directory: str | Path) -> None:
        file = Path(directory) / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist; point --tokenizer-model at a Hugging Face directory")
        self.fingerprint_bytes = file.read_bytes()
        self._tokenizer = Tokenizer.from_str(self.fingerprint_bytes.decode())
        # A document that quotes "<|image|>" must not forge a placeholder.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self.special = {name: self._tokenizer.token_to_id(name) for name in SPECIAL_TOKENS.values()}
        if missing := [name for name, number in self.special.items() if number is None]:
            raise ValueError(f"{file} lacks the special tokens {', '.join(missing)}; add them to the tokenizer")

    def ids(self) -> list[int]:
        """All token ids, special ones included; there may be gaps."""
        return list(self._tokenizer.get_vocab().values())

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, special tokens by name."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)
