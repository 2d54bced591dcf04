"""The plan of a corpus, made in parts on disk, so that its memory hardly grows with the number of samples.

Rows are the accepted samples in plan order; a group is a sequence of rows of consecutive chunks. Whatever compares
samples of different groups is partitioned by a hash into buckets, and its answer is partitioned by group. Every part
is a folder made by one task (`layout.Step`), so participants share the work as they share scanning and writing.

    census     what each thousand scans hold
    groups     which chunks form a group
    spill      per group: rows, signatures, first occurrences of every content and text signature   (spill.py)
    content    per bucket: who repeats a content of an earlier group                                (repeats.py)
    text       per bucket: the same for text signatures
    text-...   similar texts: bands, then rounds of comparisons and decisions                       (similar.py, rounds.py)
    image...   the same for images, among what is left
    verdict    per group: why each row is left out, or that it stays                                (verdict.py)
    shards     rows of every shard, duplicates, and a list of both                                  (shards.py)
"""
