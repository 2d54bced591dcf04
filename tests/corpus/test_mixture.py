"""Mixtures: shares of tokens become epochs, weights and load; blends say what was planned."""

import pytest
import yaml
from hypothesis import given, reject
from hypothesis import strategies as st

from megatron_anyexperts.corpus.mixture import (
    MixtureError,
    Part,
    Stage,
    Training,
    blend,
    corpus_parts,
    load_mixture,
    plan_stage,
    schedule,
    warnings,
)
from tests.corpus.raw import write

TRAINING = Training(global_batch=1024, sequence_length=4096, step_seconds=2.0, data_parallel=64)


def part(corpus, kind, samples, tokens):
    by_modality = {"text": tokens, "image": tokens // 2, "audio": 0, "video": 0}
    return Part(corpus, kind, samples, samples * 1000, 100, by_modality, None, False)


PARTS = st.tuples(st.integers(1, 10**9), st.integers(1, 10**12))


@given(
    sizes=st.lists(PARTS, min_size=1, max_size=5),
    shares=st.lists(st.floats(0.001, 1000), min_size=5, max_size=5),
    tokens=st.integers(1, 30 * 10**12),
)
def test_tokens_add_up_and_weights_draw_the_shares(sizes, shares, tokens):
    corpora = {f"c{n}": [part(f"c{n}", "text", *size), part(f"c{n}", "image", *size)] for n, size in enumerate(sizes)}
    stage = Stage(name="s", tokens=tokens, shares={name: shares[n] for n, name in enumerate(corpora)})
    try:
        plan = plan_stage(stage, corpora, TRAINING)
    except MixtureError as error:
        assert "less than one token" in str(error) and tokens < 10**13
        reject()
    assert sum(use.tokens for use in plan.uses) == tokens and all(use.tokens > 0 for use in plan.uses)
    assert sum(use.weight for use in plan.uses) == pytest.approx(1)
    # Drawing samples by weight yields tokens by share: weight x tokens per sample is proportional to the share.
    drawn = {use.part.name: use.weight * use.part.total_tokens / use.part.samples for use in plan.uses}
    whole = sum(drawn.values())
    for use in plan.uses:
        assert drawn[use.part.name] / whole == pytest.approx(use.tokens / tokens, rel=1e-6, abs=2 / tokens)
        assert use.epochs == pytest.approx(use.tokens / use.part.total_tokens)


def test_load_follows_from_the_step_time():
    corpora = {"c": [part("c", "text", 1000, 10**6)]}
    training = Training(global_batch=10, sequence_length=100, step_seconds=2.0, fill=1.0)
    plan = plan_stage(Stage(name="s", tokens=10**6, shares={"c": 1}), corpora, training)
    assert plan.steps == 1000 and plan.tokens_per_second == 500
    assert plan.uses[0].epochs == pytest.approx(2 / 3)
    assert plan.samples_per_second == pytest.approx(1000 * 2 / 3 / 2000)
    assert plan.bytes_per_second == pytest.approx(10**6 * 2 / 3 / 2000)


MIXTURE = """
planned:
  web: {text: {samples: 1e6, bytes: 5e9, tokens: {text: 1e9}, shards: 100}}
  pics: {image: {samples: 2e6, bytes: 1e11, tokens: {text: 1e8, image: 9e8}, shards: 20}}
stages:
  - {name: pretrain, tokens: 10e12, shares: {web: 0.75, pics: 0.25}}
  - {name: anneal, tokens: 1e9, shares: {pics/image: 1}}
training: {global_batch: 1024, sequence_length: 4096, step_seconds: 2.0, data_parallel: 64}
"""


def test_trillions_of_tokens_are_planned_with_warnings_about_repetition_and_few_shards(tmp_path):
    mixture = load_mixture(write(tmp_path / "m.yaml", MIXTURE))
    corpora = corpus_parts(mixture, tmp_path)
    plans = [plan_stage(stage, corpora, mixture.training) for stage in mixture.stages]
    assert plans[0].modality_tokens["image"] == int(2.5e12 * 0.9)
    found = warnings(mixture, plans)
    assert any("web/text is repeated 7500.0 times" in text for text in found)
    assert any("pics/image is repeated 2501.0 times" in text for text in found)
    assert any("pics/image has 20 shards for 64 data-parallel ranks" in text for text in found)
    assert len(found) == 3
    with pytest.raises(MixtureError, match="web/text is not built yet"):
        blend(plans[:1], tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("web: 0.75", "wbe: 0.75"), "'wbe' is no corpus and no corpus/kind; known: pics, pics/image, web"),
        (("web: 0.75", "web: -1"), "share web=-1.0 is negative"),
        (("shares: {pics/image: 1}", "shares: {pics: 0}"), "all shares are zero"),
        (("tokens: {text: 1e9}", "tokens: {smell: 1e9}"), r"tokens of \['smell'\]"),
        (("web: {text:", "web: {smell:"), "kind 'smell' is none of"),
        (("tokens: {text: 1e9}", "tokens: {text: 0}"), "must be positive"),
        (("tokens: 10e12", "tokens: many"), "stages.0.tokens"),
        (("global_batch: 1024", "gobal_batch: 1024"), "training.gobal_batch"),
        (("planned:", "corpora: {web: nowhere}\nplanned:"), "holds no finished corpus"),
        (("web: 0.75", "web: .nan"), "stages.0.shares.web=nan"),
        (("web: 0.75", "web: .inf"), "stages.0.shares.web=inf"),
        (("web: 0.75", "web: 1e-300"), "share of web/text is .* less than one token"),
        (("web: 0.75, pics: 0.25", "web: 1.7e+308, pics: 1.7e+308"), "the shares add up to inf"),
        (("name: anneal", "name: pretrain"), "two stages are named 'pretrain'"),
        (("step_seconds: 2.0", "step_seconds: .inf"), "training.step_seconds=inf"),
        (("global_batch: 1024, sequence_length: 4096", "global_batch: 1, sequence_length: 1"), "at least 1"),
        ((MIXTURE, "- a\n- b\n"), "it is list, not a mapping of corpora, planned, stages, training"),
        ((MIXTURE, "1: 2\n"), "not a mapping"),
        ((MIXTURE, ""), "it is NoneType, not a mapping"),
        ((MIXTURE, "[" * 5000), "cannot read it"),
        ((MIXTURE, "a: 2020-13-45"), "cannot read it: month"),
        (("pics: 0.25", "pics: 0.25, web: 0.1"), "'web' is there twice"),
        (("web: 0.75", "web: yes"), "stages.0.shares=.*yes is no number"),
        (("global_batch: 1024", "global_batch: true"), "yes is no number"),
        (("tokens: 1e9, shares", f"tokens: {10**400}, shares"), "stages.1.tokens=.*less than or equal to 10{18}"),
    ],
)
def test_unusable_mixtures_end_in_one_clear_message(tmp_path, change, message):
    with pytest.raises(MixtureError, match=message):
        mixture = load_mixture(write(tmp_path / "m.yaml", MIXTURE.replace(*change)))
        corpora = corpus_parts(mixture, tmp_path)
        [plan_stage(stage, corpora, mixture.training) for stage in mixture.stages]


def test_energon_reads_the_blend_that_was_written(tmp_path):
    from megatron.energon import (
        Cooker,
        DefaultTaskEncoder,
        TextSample,
        WorkerConfig,
        basic_sample_keys,
        get_savable_loader,
        get_train_dataset,
        stateless,
    )

    from megatron_anyexperts.corpus.build import build
    from megatron_anyexperts.corpus.workers import Share
    from tests.corpus.raw import corpus_of

    for name in ("a", "b"):
        for number in range(10):
            write(tmp_path / f"raw/{name}/{number}.txt", f"{name} {number} " + "word " * (30 if name == "a" else 3))
        corpus = corpus_of(tmp_path / "raw", {"type": "text_folder", "path": name}, name=name, validation_fraction=0)
        build(corpus, tmp_path / name, Share(), workers=0, quiet=True)
    text = """
corpora: {a: a, b: b}
stages: [{name: s, tokens: 100000, shares: {a: 0.5, b: 0.5}}]
training: {global_batch: 1, sequence_length: 100, step_seconds: 1}
"""
    mixture = load_mixture(write(tmp_path / "m.yaml", text))
    plan = plan_stage(mixture.stages[0], corpus_parts(mixture, tmp_path), mixture.training)
    path = write(tmp_path / "blends/s.yaml", yaml.safe_dump(blend([plan], tmp_path / "blends")))

    @stateless
    def cook(sample):
        return TextSample(**basic_sample_keys(sample), text=sample["__subflavors__"]["corpus"])

    class Encoder(DefaultTaskEncoder):
        cookers = [Cooker(cook)]
        decoder = None

    config = WorkerConfig(rank=0, world_size=1, num_workers=0)
    dataset = get_train_dataset(
        path, split_part="train", worker_config=config, batch_size=1, task_encoder=Encoder(),
        shuffle_buffer_size=None, max_samples_per_sequence=None,
    )  # fmt: skip
    loader = iter(get_savable_loader(dataset))
    drawn = [next(loader).text[0] for _ in range(600)]
    [weight] = [use.weight for use in plan.uses if use.part.corpus == "a"]
    assert weight < 0.35
    assert drawn.count("a") / 600 == pytest.approx(weight, abs=0.07)


def test_one_run_goes_through_all_stages(tmp_path):
    from megatron_anyexperts.data.mixture_schedule import load_schedule

    mixture = load_mixture(write(tmp_path / "m.yaml", MIXTURE))
    plans = [plan_stage(stage, corpus_parts(mixture, tmp_path), mixture.training) for stage in mixture.stages]
    path = write(tmp_path / "schedule.yaml", yaml.safe_dump(schedule(plans, mixture.training)))
    names = sorted({name for stage in yaml.safe_load(path.read_text())["stages"] for name in stage["weights"]})
    found = load_schedule(path, names, [1.0] * len(names), 64, None)
    assert len(found.starts) == len(plans) > 1
    for index, plan in enumerate(plans):
        before = sum(earlier.steps for earlier in plans[:index])
        assert found.starts[index] == before * mixture.training.global_batch // 64
        assert sorted(found.weights[index])[-len(plan.uses) :] == pytest.approx(sorted(use.weight for use in plan.uses))
