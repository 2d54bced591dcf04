"""A resumable distributed program of seconds: what the launcher is tested with where the model does not matter.

It keeps the contract of the training entry: `--run-dir`, torch.distributed from the environment, checkpoints sealed
by `survival`, heartbeats, metrics, sample keys, and a save at the next step after SIGTERM. Its "loss" depends on every
sample seen so far and on nothing else, so any lost, repeated or reordered sample shows.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_anyexperts.survival import checkpoints, retention, runlog
from megatron_anyexperts.survival.heartbeat import start_heartbeat
from megatron_anyexperts.survival.manifest import TRACKER, begin_save, iteration_directory, seal
from megatron_anyexperts.survival.run_directory import Run, rank_file

GLOBAL_BATCH = 4


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--train-iters", type=int, required=True)
    parser.add_argument("--save-interval", type=int, default=10)
    parser.add_argument("--step-seconds", type=float, default=0.05)
    parser.add_argument("--fail-at", type=int, help="raise in the last rank at this iteration, in every attempt")
    parser.add_argument("--start-seconds", type=float, default=0.0, help="time before the program heeds signals")
    parser.add_argument("--stall-at", type=int, help="stop the last rank's process at this iteration, once")
    parser.add_argument("--global-batch-size", type=int, default=GLOBAL_BATCH)
    parser.add_argument("--expert-model-parallel-size", type=int, default=1)
    args = parser.parse_args()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    run = Run(args.run_dir)
    heartbeat = start_heartbeat(run, rank)
    asked_to_stop = []
    time.sleep(args.start_seconds)
    signal.signal(signal.SIGTERM, lambda *_: asked_to_stop.append(True))
    dist.init_process_group("gloo")
    if rank == 0:
        runlog.append_event(run, "start", world_size=world)
        selection = checkpoints.prepare_resume(run.checkpoints)
        if selection.skipped:
            runlog.append_event(run, "fallback", iteration=selection.iteration, reason=str(selection))
    dist.barrier()
    tracker = run.checkpoints / TRACKER
    done, state = 0, 0.0
    if tracker.exists():
        done = int(tracker.read_text())
        state = json.loads((iteration_directory(run.checkpoints, done) / "state.json").read_text())["state"]

    def save() -> None:
        heartbeat.beat(done, "save")
        if rank == 0 and checkpoints.newest_sealed(run.checkpoints) != done:
            folder = iteration_directory(run.checkpoints, done)
            begin_save(folder)
            (folder / "state.json").write_text(json.dumps({"state": state}))
            seal(folder)
            checkpoints.repoint_tracker(run.checkpoints, done)
            retention.prune(run.checkpoints, keep_last=3)
        dist.barrier()

    while done < args.train_iters:
        heartbeat.beat(done + 1)
        time.sleep(args.step_seconds)
        if rank == world - 1 and done + 1 == args.fail_at:
            raise RuntimeError("deliberate failure")
        stalled = run.root / "stalled"
        if rank == world - 1 and done + 1 == args.stall_at and not stalled.exists():
            stalled.touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        keys = range(done * GLOBAL_BATCH + rank, (done + 1) * GLOBAL_BATCH, world)
        figures = torch.tensor([float(sum(key**2 for key in keys)), float(bool(asked_to_stop))], dtype=torch.float64)
        dist.all_reduce(figures)
        done += 1
        state = (state * 31 + figures[0].item()) % 1000003
        runlog.append_metrics(
            run, done, loss=state, loss_count=state, world=world, train_iters=args.train_iters
        ) if rank == 0 else None
        run.samples.mkdir(exist_ok=True)
        with rank_file(run.samples, rank, "jsonl").open("a") as samples:
            samples.write(json.dumps({"iteration": done, "keys": list(keys)}) + "\n")
        if figures[1].item():
            save()
            return 0
        if done % args.save_interval == 0:
            save()
    heartbeat.beat(done, "end")
    if rank == 0:
        runlog.append_event(run, "finished", iteration=done)
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
