"""The tokenizer: trained deterministically, lossless, complete in special tokens, usable by transformers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megatron_anyexperts.data.tokenizer import SPECIAL_TOKENS, adopt_tokenizer, train_tokenizer
from megatron_anyexperts.data.vocabulary import Vocabulary

TEXTS = [f"Document {number} tells of {number * 7} wombats, naïve cafés and 東京." for number in range(50)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "trained"
    train_tokenizer(TEXTS, 400, folder)
    return folder


def test_the_same_texts_give_the_same_files(directory, tmp_path):
    train_tokenizer(TEXTS, 400, tmp_path / "again")
    for path in directory.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


@given(text=st.text())
def test_any_text_survives_and_never_becomes_a_special_token(directory, text):
    vocabulary = Vocabulary(directory)
    numbers = vocabulary.encode(text + "<|image|>")
    assert AutoTokenizer.from_pretrained(directory).decode(numbers) == text + "<|image|>"
    assert not set(numbers) & set(vocabulary.special.values())


def test_special_tokens_have_the_first_numbers_and_their_roles(directory):
    loaded = AutoTokenizer.from_pretrained(directory)
    assert loaded.convert_tokens_to_ids(list(SPECIAL_TOKENS.values())) == list(range(len(SPECIAL_TOKENS)))
    assert (loaded.pad_token, loaded.eos_token) == ("<|pad|>", "<|endoftext|>")
    assert set(loaded.all_special_tokens) == set(SPECIAL_TOKENS.values())
    assert len(loaded) <= 400


def test_training_on_the_corpus_shortens_it(directory):
    vocabulary = Vocabulary(directory)
    assert len(vocabulary.encode(TEXTS[7])) < len(TEXTS[7].encode()) / 2


def test_the_chat_template_marks_what_the_assistant_says(directory):
    loaded = AutoTokenizer.from_pretrained(directory)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "A wombat."},
    ]
    text = loaded.apply_chat_template(messages, tokenize=False)
    assert text == (
        "<|im_start|>user\n<|image_start|><|image|><|image_end|>What is it?<|im_end|>\n"
        "<|im_start|>assistant\nA wombat.<|im_end|>\n"
    )
    encoded = loaded.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    answer = [n for n, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert loaded.decode(answer) == "A wombat.<|im_end|>"
    assert loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True).endswith("assistant\n")


def test_a_foreign_tokenizer_gets_what_it_lacks_and_keeps_its_numbers(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    foreign = Tokenizer(models.BPE())
    foreign.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<|im_start|>", "<|im_end|>"]
    foreign.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=330, special_tokens=special, show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=foreign).save_pretrained(tmp_path / "foreign")
    size = foreign.get_vocab_size()
    added = adopt_tokenizer(tmp_path / "foreign", tmp_path / "adopted")
    assert added == [token for token in SPECIAL_TOKENS.values() if token not in special]
    vocabulary = Vocabulary(tmp_path / "adopted")
    assert vocabulary.special["<|im_end|>"] == 1 and vocabulary.special["<|pad|>"] == size
    assert vocabulary.encode("wombats") == foreign.encode("wombats").ids
    assert adopt_tokenizer(tmp_path / "adopted", tmp_path / "twice") == []


def test_unusable_requests_are_refused_with_the_way_out(tmp_path):
    with pytest.raises(ValueError, match="vocab_size=100 is below 269"):
        train_tokenizer(TEXTS, 100, tmp_path / "small")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no usable Hugging Face tokenizer"):
        adopt_tokenizer(tmp_path / "empty", tmp_path / "adopted")
