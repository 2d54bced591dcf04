"""Chats in the forms that people have: nothing is dropped, order is kept, what is not supported says so."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from megatron_anyexperts.corpus.build import build
from megatron_anyexperts.corpus.sample import Rejected
from megatron_anyexperts.corpus.sources.turns import ROLES
from megatron_anyexperts.corpus.workers import Share
from megatron_anyexperts.data.chat import chat_parts
from megatron_anyexperts.data.samples import SampleError, Text
from megatron_anyexperts.data.tokenizer import train_tokenizer
from megatron_anyexperts.data.tool_calls import tool_call_text, tools_text
from tests.corpus.raw import corpus_of, items, png, write, write_lines


def chat(root, record):
    write_lines(root / "one.jsonl", [record])
    [item] = items(corpus_of(root, {"type": "chat", "path": "one.jsonl"}))
    return item


def spoken(item):
    """Role and text, or medium number, of every part."""
    assert not isinstance(item, Rejected), item
    return [
        (message["role"], part.get("text", part.get("media")))
        for message in item.fields["messages"]
        for part in message["content"]
    ]


SAID = [("user", "Hi"), ("assistant", "Ho")]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": None, "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
        {"messages": [], "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
        {"instruction": "Hi", "input": "", "output": "Ho"},
        {"prompt": "Hi", "completion": "Ho"},
        {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Ho"}]},
        {"question": "Hi", "answer": "Ho"},
        {"messages": [{"role": "User", "content": "Hi", "from": None}, {"role": "ASSISTANT", "content": "Ho"}]},
    ],
)
def test_forms_of_the_same_conversation(tmp_path, record):
    assert spoken(chat(tmp_path, record)) == SAID


def test_alpaca_has_input_system_and_history(tmp_path):
    record = {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be brief.", "history": [["Hi", "Ho"]]}
    assert spoken(chat(tmp_path, record)) == [
        ("system", "Be brief."), *SAID, ("user", "Add.\n1 2"), ("assistant", "3"),
    ]  # fmt: skip


@pytest.mark.parametrize("role", [name for name, role in ROLES.items() if role == "assistant"])
@pytest.mark.parametrize("change", [str.lower, str.upper, str.capitalize])
def test_names_of_the_assistant_in_any_case(tmp_path, role, change):
    record = {"conversations": [{"from": "Human", "value": "Hi"}, {"from": change(role), "value": "Ho"}]}
    assert spoken(chat(tmp_path, record)) == SAID


@pytest.mark.parametrize("flag", ["weight", "loss", "train", "training"])
@pytest.mark.parametrize("no", [0, False, 0.0])
def test_flags_of_turns_become_the_loss_mask(tmp_path, flag, no):
    turns = [("user", "a", None), ("assistant", "b", no), ("user", "c", None), ("assistant", "d", 1)]
    messages = [{"role": role, "content": text, flag: value} for role, text, value in turns]
    item = chat(tmp_path, {"messages": messages})
    targets = [part for part in chat_parts(item.fields["messages"], None) if part.target]
    assert [part.text for part in targets if isinstance(part, Text)] == ["d"] and len(targets) == 2
    messages[3][flag] = no
    assert chat(tmp_path, {"messages": messages}).reason == "no answer in the conversation"
    messages[2][flag] = True
    targets = [
        part for part in chat_parts(chat(tmp_path, {"messages": messages}).fields["messages"], None) if part.target
    ]
    assert [part.text for part in targets if isinstance(part, Text)] == ["c"]


def test_flags_survive_shards_and_their_reuse(tmp_path):
    messages = [{"role": r, "content": t} for r, t in [("user", "a"), ("assistant", "b"), ("assistant", "c")]]
    messages[1]["weight"] = 0
    write_lines(tmp_path / "a.jsonl", [{"messages": messages}])
    options = {"validation_fraction": 0}
    build(corpus_of(tmp_path, {"type": "chat", "path": "a.jsonl"}, **options), tmp_path / "one", Share(), 0, True)
    again = corpus_of(tmp_path, {"type": "webdataset", "path": "one/chat"}, **options)
    [item] = items(again)
    assert [message.get("loss") for message in item.fields["messages"]] == [None, False, None]


def test_only_the_completion_of_turns_is_learned(tmp_path):
    prompt = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    item = chat(tmp_path, {"prompt": prompt, "completion": [{"role": "assistant", "content": "d"}]})
    assert [message.get("loss") for message in item.fields["messages"]] == [None, False, None, None]


CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": "\u00e9"}'}}
CALLED = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "\u00e9"}}\n</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


def test_tools_and_their_calls_become_text(tmp_path):
    messages = [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "It is 3.", "tool_calls": None},
    ]
    item = chat(tmp_path, {"messages": messages, "tools": TOOLS})
    assert spoken(item) == [
        ("system", tools_text(TOOLS)), ("user", "Add."), ("assistant", f"{CALLED}\n{CALLED}"), ("tool", "3"),
        ("assistant", "It is 3."),
    ]  # fmt: skip
    assert spoken(chat(tmp_path, {"messages": messages, "tools": json.dumps(TOOLS), "system": "Be brief."}))[0] == (
        "system", "Be brief.\n\n" + tools_text(TOOLS),
    )  # fmt: skip
    messages[1]["content"] = "Let me see."
    assert spoken(chat(tmp_path, {"messages": messages}))[1:3] == [
        ("assistant", "Let me see."), ("assistant", f"\n{CALLED}\n{CALLED}"),
    ]  # fmt: skip
    turns = [
        ("human", "Add."),
        ("function_call", json.dumps(CALL["function"])),
        ("observation", "3"),
        ("gpt", "It is 3."),
    ]
    item = chat(tmp_path, {"conversations": [{"from": role, "value": value} for role, value in turns]})
    assert spoken(item)[1] == ("assistant", CALLED)


def test_the_chat_template_writes_calls_as_the_shards_hold_them(tmp_path):
    from transformers import AutoTokenizer

    train_tokenizer(["x"], 300, tmp_path / "t")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "t")
    for content in (None, "", "Let me see."):
        messages = [{"role": "assistant", "content": content, "tool_calls": [CALL, CALL]}]
        text = loaded.apply_chat_template(messages, tokenize=False)
        said = f"{content}\n" if content else ""
        assert text == f"<|im_start|>assistant\n{said}{tool_call_text(CALL)}\n{tool_call_text(CALL)}<|im_end|>\n"


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"weight": 0.5}, "weight of a turn is neither 0 nor 1"),
        ({"train": "yes"}, "weight of a turn is neither 0 nor 1"),
        ({"weight": 1, "train": False}, "flags of a turn disagree"),
        ({"reasoning_content": "Hm."}, "field of a turn that cannot be kept"),
        ({"refusal": "No."}, "field of a turn that cannot be kept"),
        ({"tool_calls": [{"function": {}}]}, "unusable tools or tool calls"),
        ({"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, "unusable tools or tool calls"),
        ({"tool_calls": "["}, "unusable tools or tool calls"),
        ({"content": ""}, "no answer in the conversation"),
        ({"role": "martian"}, "unknown role"),
    ],
)
def test_what_cannot_be_kept_is_rejected_with_the_reason(tmp_path, turn, reason):
    answer = {"role": "assistant", "content": "Ho"} | turn
    item = chat(tmp_path, {"messages": [{"role": "user", "content": "Hi"}, answer]})
    assert isinstance(item, Rejected) and item.reason == reason


def test_an_empty_answer_beside_good_ones_is_rejected(tmp_path):
    turns = [("human", "q"), ("gpt", ""), ("gpt", "a")]
    item = chat(tmp_path, {"conversations": [{"from": role, "value": value} for role, value in turns]})
    assert item.reason == "empty answer"


def test_records_without_a_known_form_name_the_forms(tmp_path):
    item = chat(tmp_path, {"chosen": "a", "rejected": "b"})
    assert item.reason == "no conversation" and "chosen" in item.detail and "instruction/input/output" in item.detail


def with_images(content, count=2, **more):
    return {"images": [f"{n}.png" for n in range(count)]} | more | {
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "Ho"}]
    }  # fmt: skip


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("<image>\nCompare.", [0, 1, "Compare."]),
        ("Compare.\n<image>", ["Compare.", 0, 1]),
        ("<image>\n<image>\nCompare.", [0, 1, "Compare."]),
        ("Compare.", [0, 1, "Compare."]),
        ([{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}], [0, "and", 1]),
        ([{"type": "image"}, {"type": "text", "text": "Compare."}], [0, 1, "Compare."]),
        ([{"type": "image", "index": 1, "text": None}, {"type": "image", "index": 0}], [1, 0]),
        ([{"type": "text", "text": "<image> and <image>", "index": None}], [0, " and ", 1]),
        (["Compare."], [0, 1, "Compare."]),
    ],
)
def test_images_keep_their_order_whatever_refers_to_them(tmp_path, content, expected):
    pictures = [png(n) for n in range(2)]
    for number, picture in enumerate(pictures):
        write(tmp_path / f"{number}.png", picture)
    item = chat(tmp_path, with_images(content))
    found = [said for role, said in spoken(item) if role == "user"]
    order = [pictures.index(medium.data) for medium in item.media]
    assert [order[said] if isinstance(said, int) else said for said in found] == expected


def test_parts_of_a_table_have_all_keys_and_take_images_of_their_column(tmp_path):
    parts = [{"type": "image", "text": None, "image": None}, {"type": "text", "text": "What?", "image": None}]
    answer = [{"type": "text", "text": "A thing.", "image": None}]
    record = {
        "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}],
        "images": [{"bytes": png(1), "path": None}],
    }
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), tmp_path / "a.parquet")
    [item] = items(corpus_of(tmp_path, {"type": "chat", "path": "a.parquet"}))
    assert spoken(item) == [("user", 0), ("user", "What?"), ("assistant", "A thing.")] and item.media[0].data == png(1)


@pytest.mark.parametrize(
    "text", ["How do I use the <video> tag?", "<video>\n  <source src='a'>\n</video>", "Is <audio> like <video> here?"]
)
def test_talk_about_html_stays_text(tmp_path, text):
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "Write\n<video>\n<audio>"}]
    assert spoken(chat(tmp_path, {"messages": messages})) == [("user", text), ("assistant", "Write\n<video>\n<audio>")]


@pytest.mark.parametrize("text", ["<video>\nWhat happens?", "What happens?\n<audio>", "<image>", "See <image> here."])
def test_a_tag_of_a_lost_medium_is_rejected(tmp_path, text):
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "Ho"}]
    assert chat(tmp_path, {"messages": messages}).reason == "tag without a medium"


def test_more_tags_and_parts_than_media_are_rejected(tmp_path):
    write(tmp_path / "0.png", png(1))
    assert chat(tmp_path, with_images("<image><image>", 1)).reason == "tag without a medium"
    assert chat(tmp_path, with_images([{"type": "image"}] * 2, 1)).reason == "part without a medium"


def test_a_loss_that_is_no_truth_value_is_a_bad_sample():
    with pytest.raises(SampleError, match="neither true nor false"):
        chat_parts([{"role": "assistant", "content": "x", "loss": 2}], None)
