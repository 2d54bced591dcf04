"""The plan of a corpus, made in parts on disk, so that its memory hardly grows with the number of samples.

Rows are the accepted samples in plan order; a group is a sequence of rows of consecutive chunks. Whatever compares
samples of different groups is partitioned by a hash into buckets, and its answer is partitioned by group. Every part
is a folder made by one task (`layout.Step`), so participants share the work as they share scanning and writing.

    census, groups  what the scans hold; which chunks form a group                              (spill.py)
    spill           per group: rows, signatures, first rows of each content and text signature  (spill.py)
    content, text   per bucket: who repeats a key of an earlier group                           (repeats.py)
    text-bands      per group: keys under which similar texts meet                              (similar.py)
    text-pairs-N    per bucket: similar rows, among the undecided                               (rounds.py)
    text-round      per round: who stays, who is dropped, who waits for the next one            (rounds.py)
    kept            per group: what exact and text deduplication leave                          (survivors.py)
    image...        the same for images, among these
    verdict         per group: why each row is left out, or that it stays                       (survivors.py)
    shards          the rows of every shard, and the duplicates                                 (shards.py)
"""
