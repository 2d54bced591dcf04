"""Build WebDataset shards from raw files.

Stages, each resumable, each cut into pieces that any process may do:
    list   what there is            -> .build/chunks.jsonl        (sources/)
    scan   each chunk: read, check  -> .build/scan/*.npz          (scan.py, probe.py)
    plan   a pure function of the scans: which sample goes into which shard (plan.py)
    write  each shard by itself     -> KIND/SPLIT/shard-*.tar     (write.py)
    finish metadata, blend, manifest, list of rejected samples    (finish.py)
"""
