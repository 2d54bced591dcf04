"""The card of an exported model: how it is loaded, what it was trained on, what its routing does."""

from __future__ import annotations

from pathlib import Path

from megatron_anyexperts.analysis.data_facts import DataFacts, data_facts
from megatron_anyexperts.analysis.run_record import RunRecord, number
from megatron_anyexperts.media import MODALITIES
from megatron_anyexperts.survival.status import printable

_HEAD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [mixture-of-experts, anyexperts]
---
# {name}

A mixture-of-experts language model in which every token gets as many experts as it needs (the method of
[AnyExperts](https://arxiv.org/abs/2511.18314)), trained with megatron-anyexperts. It needs torch and transformers 5;
its code lies beside the weights.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True, dtype="auto")
inputs = tokenizer("Once", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
print(model(**inputs).slots)  # [mixture layers, batch, tokens]
```
`from_pretrained(..., anyexperts_k_max=...)` changes the budget.
"""


def model_card(name: str, record: RunRecord | None) -> str:
    """Markdown for a folder that transformers loads.

    Args:
        name: of the folder.
        record: of the run that trained the model; None: the card says that nothing is known.
    """
    parts = [_HEAD.format(name=name)]
    if record is None:
        parts.append("## Training\n\nExported from a checkpoint without its run: data and budget are not known here.\n")
    else:
        parts += [_data(data_facts(record)), _training(record), _routing(record)]
    return "\n".join(filter(None, parts))


def _data(facts: DataFacts) -> str:
    lines = ["## Data\n"]
    for source in facts.sources:
        share = "" if source.share is None else f", {source.share:.1%}"
        lines.append(f"- {printable(Path(source.path).name)} ({printable(source.kind) or 'any kind'}{share})")
    lines += [f"- {tokens:,} tokens of {modality}" for modality, tokens in facts.tokens.items()]
    lines += [f"- not known: {printable(note)}" for note in facts.notes]
    return "\n".join(lines) + "\n"


def _training(record: RunRecord) -> str:
    row = record.row()
    lines = ["## Training\n", *_figures(("steps", row["step"], ",.0f"), ("loss", row["loss"], ".4f"))]
    lines += _figures(("held-out loss", row["held_out_loss"], ".4f"))
    lines += [f"- {printable(version)}" for version in record.versions]
    return "\n".join(lines) + "\n"


def _routing(record: RunRecord) -> str:
    """Slots of the newest log interval, by modality."""
    found = [
        (name, number(record.routing, name, "slots"), number(record.routing, name, "real"))
        for name in ("all", *MODALITIES)
    ]
    rows = [f"| {name} | {slots:.3f} | {real:.3f} |" for name, slots, real in found if None not in (slots, real)]
    if not rows:
        return ""
    targets = ", ".join(f"{value:g} {'real ' if name == 'real' else ''}slots" for name, value in record.targets.items())
    head = ["## Budget and routing\n", f"Trained for {targets} a token on average.\n" if targets else ""]
    table = ["| tokens | slots | real slots |", "| --- | --- | --- |", *rows]
    return "\n".join([*filter(None, head), *table]) + "\n\nMeans of the last log interval.\n"


def _figures(*figures: tuple[str, float | None, str]) -> list[str]:
    return [f"- {name}: {value:{form}}" for name, value, form in figures if value is not None]
