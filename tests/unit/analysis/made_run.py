"""A run directory as training leaves it, without the training; every text in it is one that a browser would obey."""

from pathlib import Path

import yaml

from megatron_anyexperts.survival import runlog
from megatron_anyexperts.survival.run_directory import Run

HOSTILE = "<script>document.title='owned'</script><img src=x onerror=alert(1)>$x_1$"


def routing(slots: float, layers: tuple[str, ...] = ("2", "<script>4")) -> dict:
    tokens = {"tokens": 100, "slots": slots, "real": slots - 0.2, "slots_histogram": [0, 50, 30, 20]}
    load = {"rank_max_over_mean": 1.1, "rank_max_over_mean_peak": 1.4, "expert_max_over_mean": 1.8}
    each = {"all": tokens, "text": tokens, "load": load}
    whole = {name: figures | {"tokens": 200} for name, figures in each.items() if name != "load"}
    return {**whole, "load": load, "layers": dict.fromkeys(layers, each), "nonfinite_tokens": 0}


def make_run(root: Path, steps: int = 40, loss: float = 6.0, **flags: object) -> Run:
    """A run with a line at every tenth step, evaluations at every twentieth, a crash and a restart."""
    run = Run(root).create()
    runlog.append_event(run, "start", world_size=2, restart=0)
    runlog.append_event(run, "crash", reason=HOSTILE)
    runlog.append_event(run, "start", world_size=2, restart=1)
    for step in range(10, steps + 1, 10):
        figures = {"loss": loss - step / 50, "loss_text": loss - step / 60, "samples_read": 30, "samples_lost": 1}
        speed = {"tokens_per_s": 1000.0 + step, "data_wait_share": 0.02, "load_max_over_mean": 1.1}
        runlog.append_metrics(
            run, step, **figures, **speed, routing=routing(2 + step / 100), consumed_samples=16 * step, train_iters=100
        )
        if step % 20 == 0:
            runlog.append_held_out(run, step, loss=loss - step / 40, loss_text=loss - step / 45)
    runlog.write_expert_load(run, steps, {2: [0.5, 1.5, 1.0], 4: [1.0, 1.0, 1.0]})
    runlog.append(run.quarantine, {"key": HOSTILE, "stage": "decode", "reason": "signal 11"})
    runlog.append(run.samples / "rank0000.jsonl", {"iteration": 1, "keys": ["text/a", "text/b", f"{HOSTILE}/c"]})
    given = {"anyexperts-target-slots": 2.0, "anyexperts-target-real": 1.8, "lr": 0.003, "data-path": HOSTILE, **flags}
    run.config.write_text("# started as: x\n# torch 2.15.0\n" + yaml.safe_dump(given), encoding="utf-8")
    return run
