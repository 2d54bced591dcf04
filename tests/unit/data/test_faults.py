import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_anyexperts.data.config import DataConfig
from megatron_anyexperts.data.faults import ErrorBudgetExceeded, FaultLedger, Quarantine, over_budget
from megatron_anyexperts.data.samples import SampleError


@given(st.integers(0, 5000), st.integers(0, 100_000), st.integers(0, 200), st.floats(0, 1))
def test_a_stop_needs_a_spent_total_or_a_rate_over_enough_samples(lost, seen, budget, rate):
    reason = over_budget(lost, seen, budget, rate)
    assert (reason is not None) == (lost > budget or (seen >= 1000 and lost > rate * seen))


def test_a_lost_sample_is_logged_with_key_and_counted(caplog):
    ledger = FaultLedger(budget=1, rate=1.0)
    ledger.count_sample()
    with caplog.at_level(logging.WARNING):
        ledger.handle(ValueError("unreadable image"), {"__key__": "abc"})
    assert "lost sample abc" in caplog.text and "unreadable image" in caplog.text
    assert (ledger.seen, ledger.lost) == (1, 1)


def test_one_sample_beyond_the_budget_stops_with_a_way_out():
    ledger = FaultLedger(budget=0, rate=1.0)
    with pytest.raises(ErrorBudgetExceeded, match=r"data_error_budget=0; .* abc .*verify_shards"):
        ledger.handle(ValueError("x"), {"__key__": "abc"})


@pytest.mark.parametrize(
    "settings",
    [
        {"data_streams": 0},
        {"data_packing_buffer": 0},
        {"data_error_rate": 1.5},
        {"data_video_fps": 0.0},
        {"data_audio_max_seconds": -1.0},
        {"data_image_min_patches": 2048},
    ],
)
def test_settings_out_of_range_name_field_and_value(settings):
    [(name, value)] = settings.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        DataConfig(**settings)


def test_tolerance_is_no_part_of_the_sample_order():
    assert DataConfig(data_error_budget=5, data_storage_retries=9).order_fields() == DataConfig().order_fields()
    assert DataConfig(data_run_length=5).order_fields() != DataConfig().order_fields()


def test_a_sample_in_quarantine_is_refused_at_its_stage_by_all_that_share_the_list(tmp_path):
    path = tmp_path / "logs/quarantine.jsonl"
    one, other = Quarantine(path), Quarantine(path)
    for quarantine in (one, other):
        quarantine.add("image_text/abc", "decode", "decoding kills the process: signal 11 (SIGSEGV)")
    assert len(path.read_text().splitlines()) == 1
    for quarantine in (one, Quarantine(path)):
        with pytest.raises(SampleError, match="in quarantine: .*quarantine.jsonl"):
            quarantine.check("image_text/abc", "decode")
        quarantine.check("image_text/abc", "plan")
        quarantine.check("image_text/abd", "decode")
    Quarantine().add("x", "plan", "kept by this process alone")
