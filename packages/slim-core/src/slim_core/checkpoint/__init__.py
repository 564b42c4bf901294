"""Checkpoint I/O: a lazy reader, block-quantised FP8 sources, a streaming sharded writer, the journal of a run."""
