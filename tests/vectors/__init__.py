"""Reference vectors of the DAPO mathematics, and what holds the code against them.

    file.py              reads the file, and the inputs of a vector: what nobody reads is not understood
    loss.py              groups of the learner: policy_loss agg advantage kl tis entropy
    groups.py            groups of rewards and evaluation: overlong reward_scaling filter eval verifier
    dynamic_sampling.py  the group that goes through the whole state machine
    off_policy.py        groups that are named as a method: gmpo sapo vespo dppo_tv … maxrl reinforce_pp
    reference.py         what those expect, from the papers' equations; make.py writes it to a file
    comparison.py        one check per group, and every leaf of `expected` against what it computed

Every number comes from the functions that training calls. `pytest tests/test_vectors.py` runs one test per vector.
"""
