"""The tokenizer of released weights gets what media and chat need; everything agrees on it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_anyexperts.data.tokenizer import CHAT_TEMPLATE, SPECIAL_TOKENS, adopt_tokenizer
from megatron_anyexperts.data.vocabulary import Vocabulary
from megatron_anyexperts.survival.manifest import tracked_checkpoint
from megatron_anyexperts.training import identity
from megatron_anyexperts.training.arguments import UsageError
from megatron_anyexperts.weights.conversion import import_weights
from megatron_anyexperts.weights.export import export_weights
from tests.unit.weights.released_models import SIZES, released
from tests.unit.weights.test_families import FP32, TOKENS, loaded

OLD = SIZES["vocab_size"]
MESSAGES = [{"role": "user", "content": "hello"}]


def write(folder: Path, size: int, name: str = "smollm2", template: str | None = None) -> torch.nn.Module:
    """A released model with a tokenizer of `size` tokens, of which one is ours already."""
    model = released(name, folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<s>", "<|im_end|>"]
    words = [chr(first) + chr(second) for first in range(97, 123) for second in range(97, 123)]
    tokenizer.train_from_iterator(words, trainers.BpeTrainer(vocab_size=size, special_tokens=special))
    assert tokenizer.get_vocab_size() == size
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", chat_template=template)
    fast.save_pretrained(folder)
    return model


def fingerprint(folder: Path) -> str:
    return identity.tokenizer_fingerprint(str(folder))


def test_rows_grow_by_the_mean_and_old_tokens_stay_what_they_were(tmp_path, one_rank, capsys):
    theirs = write(tmp_path / "hf", 90, "llama")
    import_weights(tmp_path / "hf", tmp_path / "ours", add_tokens=True)
    assert "12 tokens added: <|pad|>" in (said := capsys.readouterr().out) and "rows 96 -> 128" in said
    ids = Vocabulary(tmp_path / "ours/hf").special
    assert ids["<|im_end|>"] == 1 and sorted(ids.values())[1:] == list(range(90, 102))
    files = export_weights(tmp_path / "ours", tmp_path / "ours/hf/config.json", tmp_path / "back")
    tensors = {name: value for file in files for name, value in load_file(file).items()}
    for name, old in (("model.embed_tokens", theirs.model.embed_tokens), ("lm_head", theirs.lm_head)):
        grown, old = tensors[f"{name}.weight"], old.weight.detach()
        assert grown.shape[0] == 128 and torch.equal(grown[:90], old[:90])
        torch.testing.assert_close(grown[90:102], old[:90].mean(0).expand(12, -1))
        assert torch.equal(grown[102:], grown[101:102].expand(26, -1))
    with torch.no_grad():
        here = loaded(tmp_path / "ours")(TOKENS % 90, torch.arange(TOKENS.shape[1])[None])[..., :90]
        torch.testing.assert_close(here, theirs(TOKENS % 90).logits[..., :90], **FP32)


def test_spare_rows_are_taken_before_new_ones(tmp_path):
    write(tmp_path / "hf", 80)
    import_weights(tmp_path / "hf", tmp_path / "ours", add_tokens=True)
    assert yaml.safe_load((tmp_path / "ours/model.yaml").read_text())["padded-vocab-size"] == OLD
    files = export_weights(tmp_path / "ours", tmp_path / "ours/hf/config.json", tmp_path / "back")
    tensors = {name: value for file in files for name, value in load_file(file).items()}
    rows = tensors["model.embed_tokens.weight"]
    assert len(rows) == OLD
    torch.testing.assert_close(rows[80:92], rows[:80].mean(0).expand(12, -1))


def test_corpus_training_export_and_chat_template_agree_by_fingerprint(tmp_path):
    write(tmp_path / "hf", 90, template="{{ messages[0]['content'] }} in its own way")
    import_weights(tmp_path / "hf", tmp_path / "ours", add_tokens=True)
    own = fingerprint(tmp_path / "ours/hf")
    assert identity.read(tracked_checkpoint(tmp_path / "ours"))["tokenizer_model"] == own
    adopt_tokenizer(tmp_path / "ours/hf", tmp_path / "shards/tokenizer")  # as the corpus builder does
    assert fingerprint(tmp_path / "shards/tokenizer") == own
    export_weights(tmp_path / "ours", tmp_path / "ours/hf/config.json", tmp_path / "back")
    assert fingerprint(tmp_path / "back") == own
    texts = [
        AutoTokenizer.from_pretrained(tmp_path / name).apply_chat_template(MESSAGES, tokenize=False)
        for name in ("ours/hf", "shards/tokenizer", "back")
    ]
    assert texts == ["<|im_start|>user\nhello<|im_end|>\n"] * 3
    ids = Vocabulary(tmp_path / "back").special
    for name in ("config.json", "generation_config.json"):
        said = json.loads((tmp_path / "back" / name).read_text())
        assert said["eos_token_id"] == [ids[SPECIAL_TOKENS["end_of_text"]], ids[SPECIAL_TOKENS["turn_end"]]]
        assert said["pad_token_id"] == ids[SPECIAL_TOKENS["pad"]]


def test_a_template_that_writes_the_same_is_kept(tmp_path):
    same = CHAT_TEMPLATE + "{# mine #}"
    write(tmp_path / "hf", 90, template=same)
    adopt_tokenizer(tmp_path / "hf", tmp_path / "ours")
    assert AutoTokenizer.from_pretrained(tmp_path / "ours").chat_template == same


def test_an_export_with_another_tokenizer_is_refused(tmp_path):
    write(tmp_path / "hf", 90)
    import_weights(tmp_path / "hf", tmp_path / "ours", add_tokens=True)
    shutil.copytree(tmp_path / "ours/hf", tmp_path / "mixed")
    shutil.copyfile(tmp_path / "hf/tokenizer.json", tmp_path / "mixed/tokenizer.json")
    with pytest.raises(UsageError, match=r"go with the tokenizer of content \w+, .*mixed holds"):
        export_weights(tmp_path / "ours", tmp_path / "mixed/config.json", tmp_path / "back")


def test_weights_without_a_tokenizer_get_no_tokens(tmp_path):
    released("llama", tmp_path / "hf")
    with pytest.raises(UsageError, match="--add-tokens: .* holds no usable Hugging Face tokenizer"):
        import_weights(tmp_path / "hf", tmp_path / "ours", add_tokens=True)
    assert not (tmp_path / "ours").exists()
