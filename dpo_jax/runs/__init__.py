"""A run on disk: a directory of logs (``directory``) and checkpoints (``checkpoint``) of any pytree.

A checkpoint holds the state's arrays with their checksums, the lengths of the logs, and the options and inputs of the
run (``manifest``), so that a killed run resumes exactly and a run whose options changed is refused.
"""
