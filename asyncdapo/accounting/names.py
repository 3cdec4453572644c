"""Names inside of metrics that one stage writes and others read: states of processes, buckets of staleness.

In: nothing. Out: constants, in the order in which charts and panels have them.
"""

WORKER_STATES = ("generate", "load", "environment", "score", "send", "lease")
"""Of a rollout worker, `rollout/time/STATE_s`."""
LEARNER_STATES = ("wait", "prepare", "first_pass", "gradient", "sum", "optimizer", "publish", "checkpoint")
"""Of a learner rank, `learner/time/STATE_s`; the rest of its time is `other`."""
STALENESS_BUCKETS = ("0", "1", "2", "3_4", "5_8", "9_up")
"""Train steps between the weights that sampled and those that are trained, `learner/staleness_BUCKET/NAME`."""
