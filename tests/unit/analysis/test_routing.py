"""Planted structure gives what the formulas demand, and routing without structure what chance gives."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from megatron_anyexperts.analysis.routing import balance, classifier, coactivation, signatures, slot_use, specialisation
from megatron_anyexperts.analysis.routing.chance import permuted_within, random_routing
from megatron_anyexperts.analysis.routing.intervals import measured
from megatron_anyexperts.analysis.routing.stability import (
    last_change_N,
    measure_fluctuation,
    measure_saturation,
    saturation_N,
)
from tests.unit.analysis.planted import (
    EXPERTS,
    SAMPLE,
    SAMPLES,
    TASK,
    TASKS,
    TOKENS,
    collapsed,
    specialists,
    without_preference,
)

ACTIVE = arrays(bool, st.tuples(st.integers(1, 30), st.integers(2, 6)))


def inside(value, low, high):
    return low - 1e-9 <= value <= high + 1e-9


# ---- baselines


@given(st.lists(st.integers(0, 6), min_size=1, max_size=50), st.integers(6, 9), st.integers(0, 99))
def test_random_routing_keeps_every_tokens_number_of_experts(real, experts, seed):
    active = random_routing(np.array(real), experts, np.random.default_rng(seed))
    assert active.shape == (len(real), experts) and active.sum(1).tolist() == real


def test_random_routing_is_balanced_or_follows_loads():
    generator = np.random.default_rng(0)
    loads = random_routing(np.full(20_000, 3), 6, generator).mean(0)
    assert loads == pytest.approx(np.full(6, 0.5), abs=0.02)
    wanted = np.array([4.0, 3.0, 2.0, 1.0, 0.0])
    loads = random_routing(np.ones(20_000, int), 5, generator, wanted).mean(0)
    assert loads == pytest.approx(wanted / 10, abs=0.02) and loads[4] == 0


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), min_size=1, max_size=40), st.integers(0, 99))
def test_permuting_within_groups_keeps_each_groups_values(pairs, seed):
    group, values = (np.array(column) for column in zip(*pairs, strict=True))
    mixed = permuted_within(values, group, np.random.default_rng(seed))
    for number in set(group.tolist()):
        assert sorted(mixed[group == number]) == sorted(values[group == number])


def test_an_interval_holds_the_truth_about_as_often_as_it_says():
    generator, hits = np.random.default_rng(1), 0
    for turn in range(100):
        values = generator.normal(2.0, 1.0, 60)
        found = measured(lambda drawn, values=values: values[drawn].mean(), 60, [0.0], "none", seed=turn)
        hits += found.low <= 2.0 <= found.high
    assert 86 <= hits <= 100
    assert math.isnan(measured(lambda drawn: 1.0, 1, [0.0], "none").low)  # one sample has no interval


# ---- signatures


@given(ACTIVE, st.data())
def test_a_signature_is_the_frequency_of_each_expert_in_a_prompt(active, data):
    sample = np.array(data.draw(st.lists(st.integers(0, 4), min_size=len(active), max_size=len(active))))
    found = signatures.signatures(np.stack([active, ~active]), sample, 5)
    for number in range(5):
        own = active[sample == number]
        expected = own.mean(0) if len(own) else np.zeros(active.shape[1])
        assert found[number, 0] == pytest.approx(expected)
        assert found[number, 1] == pytest.approx(1 - expected if len(own) else expected)


def test_published_moments_give_the_published_effect_size():
    prompts = 20  # of each of four categories
    within, across = 4 * prompts * (prompts - 1) // 2, 6 * prompts**2
    found = signatures.Similarity(0.8435, 0.6225, 0.0879, 0.1687, within, across)
    assert found.effect == pytest.approx(1.44, abs=0.01)


def test_similarity_pairs_no_sample_with_itself():
    cosines = np.array([[1.0, 0.2, 0.4], [0.2, 1.0, 0.6], [0.4, 0.6, 1.0]])
    found = signatures.similarity(cosines, np.array([0, 0, 1]), np.array([0, 0, 1, 2]))
    assert (found.within_pairs, found.across_pairs) == (2, 3)
    assert found.within == pytest.approx(0.2) and found.across == pytest.approx((0.4 + 0.4 + 0.6) / 3)


def test_specialists_have_signatures_of_their_task():
    found = signatures.measure_similarity(specialists(), SAMPLE, TASK)
    assert found["within"].value == pytest.approx(1) and found["across"].value == pytest.approx(0, abs=1e-12)
    difference = found["within - across"]
    assert difference.null == pytest.approx(0, abs=0.05) and difference.stands_out and difference.low > 0.99


def test_random_routing_has_no_signatures():
    found = signatures.measure_similarity(without_preference(), SAMPLE, TASK)
    for name in ("within", "across"):
        assert found[name].value == pytest.approx(found[name].null, abs=0.03)
    assert not found["effect size d"].stands_out and abs(found["effect size d"].value) < 0.3


def test_collapsed_routing_has_one_signature():
    found = signatures.measure_similarity(collapsed(), SAMPLE, TASK)
    assert found["within"].value == pytest.approx(1) and found["across"].value == pytest.approx(1)


def test_the_task_is_told_from_specialists_alone():
    told = classifier.measure_classifier(specialists(), SAMPLE, TASK, (2,))
    chance = classifier.measure_classifier(without_preference(), SAMPLE, TASK, (2,))
    for name in ("all layers", "layer 2"):
        assert told[name].value == 1.0 and told[name].stands_out
        assert abs(chance[name].value - chance[name].null) < 0.2 and inside(chance[name].null, 0.1, 0.4)
    assert told["all layers, balanced random routing"].value < 0.6
    with pytest.raises(classifier.TooFewSamples, match="two tasks of 5 samples"):
        classifier.fold_accuracies(np.zeros((6, 2)), np.array([0, 0, 0, 0, 0, 1]))


# ---- experts


@given(ACTIVE)
def test_coactivation_is_its_formula(active):
    shares = coactivation.coactivation(coactivation.pair_counts(active))
    for i in range(active.shape[1]):
        for j in range(active.shape[1]):
            if i != j and active[:, i].any():
                assert shares[i, j] == pytest.approx((active[:, i] & active[:, j]).sum() / active[:, i].sum())
            else:
                assert np.isnan(shares[i, j])


def test_pairs_that_go_together_stand_out_and_random_ones_do_not():
    pairs = coactivation.measure_coactivation(specialists()[0], SAMPLE, SAMPLES)
    assert pairs.value == 1 and pairs.stands_out and inside(pairs.null, 1 / 7, 0.3)
    chance = coactivation.measure_coactivation(without_preference()[0], SAMPLE, SAMPLES)
    assert not chance.stands_out
    shares = coactivation.coactivation(coactivation.pair_counts(without_preference()[0]))
    assert np.nanmean(shares) == pytest.approx(1 / (EXPERTS - 1), abs=0.005)


def test_domains_of_specialists():
    counts, sizes = specialisation.group_counts(specialists()[0], TASK[SAMPLE], TASKS)
    assert specialisation.shares(counts, sizes).tolist() == np.repeat(np.eye(TASKS), 2, axis=1).tolist()
    found = specialisation.measure_domains(specialists()[0], SAMPLE, TASK)
    assert found.value == pytest.approx(np.std([1, 0, 0, 0])) and found.stands_out
    assert not specialisation.measure_domains(without_preference()[0], SAMPLE, TASK).stands_out
    assert specialisation.measure_domains(collapsed()[0], SAMPLE, TASK).value == 0


def test_kinds_of_tokens_within_samples():
    kind = np.arange(SAMPLES * TOKENS) % 2
    active = np.zeros((SAMPLES * TOKENS, EXPERTS), bool)
    active[np.arange(len(kind)), kind] = True
    found = specialisation.measure_kinds(active, SAMPLE, kind, SAMPLES)
    assert found.value == pytest.approx(np.std([1, 0]) * 2 / EXPERTS) and found.stands_out
    # Experts of a task are not experts of a kind, though kinds are not equally frequent in every sample.
    assert not specialisation.measure_kinds(specialists()[0], SAMPLE, kind, SAMPLES).stands_out


def test_vocabulary_counts_frequent_tokens_alone():
    token = np.arange(SAMPLES * TOKENS) % EXPERTS
    active = np.eye(EXPERTS, dtype=bool)[token]
    found = specialisation.measure_vocabulary(active, SAMPLE, token, SAMPLES)
    assert found.value == 1 and found.stands_out and inside(found.null, 1 / EXPERTS, 0.3)
    assert not specialisation.measure_vocabulary(without_preference()[0], SAMPLE, token, SAMPLES).stands_out
    token = np.array([0] * 10 + [1] * 9)
    active = np.array([[True, False]] * 5 + [[False, True]] * 14)
    assert specialisation.vocabulary(active, token) == 0.5  # the other id has nine occurrences


def test_balance_of_even_collapsed_and_random_loads():
    even = {name: figure(np.full(8, 5.0)) for name, figure in balance.FIGURES.items()}
    assert even == {"max violation": 0, "load entropy": pytest.approx(1), "dead experts": 0}
    found = balance.measure_balance(collapsed()[0], SAMPLE, SAMPLES)
    assert found["max violation"].value == EXPERTS / 2 - 1
    assert found["load entropy"].value == pytest.approx(math.log(2) / math.log(EXPERTS))
    assert found["dead experts"].value == EXPERTS - 2
    assert all(value.stands_out for value in found.values())
    chance = balance.measure_balance(without_preference()[0], SAMPLE, SAMPLES)
    assert not any(value.stands_out for value in chance.values())


# ---- checkpoints


def test_saturation_of_same_other_and_half_the_experts():
    first, other = np.array([[True, True, False, False]]), np.array([[False, False, True, True]])
    half = np.array([[True, False, True, False]])
    assert [saturation_N(each, first)[0] for each in (first, half, other)] == [1, 0.5, 0]
    assert np.isnan(saturation_N(first, np.zeros((1, 4), bool))[0])
    same = measure_saturation(specialists()[0], specialists()[0], SAMPLE, SAMPLES)
    assert same.value == 1 and same.stands_out and same.null == pytest.approx(1 / TASKS, abs=0.03)
    chance = measure_saturation(without_preference(0)[0], without_preference(1)[0], SAMPLE, SAMPLES)
    assert not chance.stands_out and chance.null == pytest.approx(2 / EXPERTS, abs=0.02)


@given(arrays(np.int64, st.tuples(st.integers(1, 5), st.integers(1, 8)), elements=st.integers(0, 2)))
def test_the_last_change_is_the_last_checkpoint_that_differs_from_the_end(top):
    for token, last in enumerate(last_change_N(top)):
        differing = [step for step in range(len(top)) if top[step, token] != top[-1, token]]
        assert last == max(differing, default=-1)


def test_fluctuation_falls_as_tokens_settle():
    top = np.tile(np.arange(SAMPLES * TOKENS) % EXPERTS, (4, 1))
    top[0] += 1  # all change after the first, a half after the second
    top[1, ::2] += 1
    shares = [measure_fluctuation(top, step, SAMPLE, SAMPLES).value for step in range(3)]
    assert shares == [1.0, 0.5, 0.0]
    assert measure_fluctuation(top, 2, SAMPLE, SAMPLES).stands_out


# ---- slots


def test_classes_of_tokens():
    texts = {" the": "function word", "42": "number", " 3.5": "number", "sea": "other", "();": "code and marks",
             "foo_bar": "code and marks", ",": "code and marks", "": "code and marks"}  # fmt: skip
    assert {text: slot_use.class_of(text) for text in texts} == texts
    words = list(texts)
    token, place = np.repeat(np.arange(len(words)), 5), np.tile(np.arange(5), len(words))
    named = [slot_use.CLASSES[each] for each in slot_use.token_classes(token, place, words.__getitem__)]
    assert named[:5] == ["first of document", *["function word"] * 4] and named[5:10] == ["number"] * 5
    assert slot_use.CLASSES[slot_use.token_classes(np.array([3]), np.array([4]), words.__getitem__)[0]] == "rare"


@given(st.lists(st.integers(0, 5000), min_size=1))
def test_positions_fall_into_the_bin_that_names_them(places):
    bins, names = slot_use.position_bins(np.array(places))
    for place, number in zip(places, bins, strict=True):
        low, _, high = names[number].partition("-")
        assert int(low) <= place <= int(high or low)


def test_slots_of_a_group_that_gets_more_stand_out():
    group = np.arange(SAMPLES * TOKENS) % 2
    generator = np.random.default_rng(0)
    slots = generator.integers(1, 4, len(group)) + 2 * group
    found = slot_use.measure_slots(slots, group, ["few", "many", "none"], SAMPLE, SAMPLES)
    assert list(found) == ["few", "many"]
    assert found["few"].value == pytest.approx(2, abs=0.1) and found["many"].value == pytest.approx(4, abs=0.1)
    assert found["few"].null == pytest.approx(3, abs=0.1) and found["many"].stands_out
    alike = slot_use.measure_slots(slots - 2 * group, group, ["one", "other"], SAMPLE, SAMPLES)
    assert all(abs(value.value - value.null) < 0.1 for value in alike.values())
