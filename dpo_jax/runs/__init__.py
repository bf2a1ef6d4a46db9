"""A run on disk: a directory of logs (``directory``) and saved steps (``checkpoint``); any pytree can be its state.

A save holds the state's arrays with their checksums, the lengths of the logs and what made them (``manifest``), so that
a run that was killed resumes exactly, and one whose options changed is refused. What is trained is not known here.
"""
