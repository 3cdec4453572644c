"""The invariants of a ledger, as SQL that finds the rows that break them.

In a sound ledger no query returns a row. The columns of a returned row say what is wrong. Parameters come from the
run's config.yaml: `:bound` (staleness in force), `:batch_min`, `:batch_max` (groups in a batch, copies counted),
`:group_size`, `:max_attempts`, `:replaces` (1 under `filter.mode: replace`); and from the ledger: `:finished` (1 once
the run has ended).

The tables hold only history that was not undone, so all sections but the last read as if there had been no rollback.
The last section finds errors of rollbacks: rows of an undone history that are still there.
Does not own: reading files, metrics.jsonl, payload segments (`audit`).
"""

_PROMPT_STATES = "'waiting','leased','queued','spare','cut','trained','filtered','expired','failed','retired','unused'"
_GROUP_STATES = "'queued','spare','cut','trained','filtered','expired','surplus','failed'"
_LEASE_OUTCOMES = "'done','withdrawn','lost','rejected','failed'"
_SHARED_STATES = "'queued','spare','cut','trained','filtered'"
"""States that a prompt shares with its one live group."""
NUM_COPIES = "(SELECT COALESCE(SUM(value), 0) FROM json_each(b.copies))"
"""Copies of members in a row `b` of `batches`."""

INVARIANTS = {
    # ------------------------------------------------------------------------------------------------------- prompts
    "a prompt is in one legal state": f"""
        SELECT prompt_id, COUNT(*) AS num_rows, MIN(state) AS state FROM prompts
        GROUP BY prompt_id HAVING COUNT(*) > 1 OR MIN(state) NOT IN ({_PROMPT_STATES})""",
    "a finished run has no prompt without an end": """
        SELECT prompt_id, state FROM prompts
        WHERE :finished AND state IN ('waiting','leased','queued','spare','cut')""",
    "a prompt has at most one live group, and shares its state and step": f"""
        SELECT p.prompt_id, p.state, p.step, GROUP_CONCAT(g.state) AS group_states, MAX(g.step) AS group_step
        FROM prompts p LEFT JOIN groups g ON g.prompt_id = p.prompt_id AND g.state IN ({_SHARED_STATES})
        GROUP BY p.prompt_id
        HAVING COUNT(g.group_id) <> (p.state IN ({_SHARED_STATES}))
            OR (COUNT(g.group_id) = 1 AND (MAX(g.state) <> p.state OR MAX(g.step) IS NOT p.step))""",
    "a prompt is trained at most once": """
        SELECT prompt_id, COUNT(*) AS trained_groups FROM groups WHERE state = 'trained'
        GROUP BY prompt_id HAVING COUNT(*) > 1""",
    "a leased prompt has one open lease, every other none": """
        SELECT p.prompt_id, p.state, COUNT(l.lease_id) AS open_leases
        FROM prompts p LEFT JOIN leases l ON l.prompt_id = p.prompt_id AND l.outcome IS NULL
        GROUP BY p.prompt_id HAVING COUNT(l.lease_id) <> (p.state = 'leased')""",
    "an expired prompt has an expired group or a withdrawn lease": """
        SELECT prompt_id FROM prompts p WHERE state = 'expired'
        AND NOT EXISTS (SELECT 1 FROM groups g WHERE g.prompt_id = p.prompt_id AND g.state = 'expired')
        AND NOT EXISTS (SELECT 1 FROM leases l WHERE l.prompt_id = p.prompt_id AND l.outcome = 'withdrawn')""",
    "a failed prompt has used up its attempts or has a failed lease": """
        SELECT prompt_id, attempts FROM prompts p WHERE state = 'failed' AND attempts < :max_attempts
        AND NOT EXISTS (SELECT 1 FROM leases l WHERE l.prompt_id = p.prompt_id AND l.outcome = 'failed')""",
    "a prompt uses at most max_attempts": """
        SELECT prompt_id, attempts FROM prompts WHERE attempts > :max_attempts""",
    "a prompt's attempts are its lost and rejected leases, and stale ones if those are sampled again": """
        SELECT p.prompt_id, p.attempts, COUNT(l.lease_id) AS ended_leases
        FROM prompts p LEFT JOIN leases l ON l.prompt_id = p.prompt_id
        LEFT JOIN groups g ON g.lease_id = l.lease_id AND g.state = 'expired'
        GROUP BY p.prompt_id HAVING p.attempts NOT BETWEEN COALESCE(SUM(l.outcome IN ('lost', 'rejected')), 0)
            AND COALESCE(SUM(l.outcome IN ('lost', 'rejected', 'withdrawn') OR g.group_id IS NOT NULL), 0)""",
    "a waiting prompt has its place in the stream, any other none": """
        SELECT prompt_id, state, place FROM prompts WHERE (state = 'waiting') <> (place IS NOT NULL)""",
    # -------------------------------------------------------------------------------------------------------- leases
    "a lease has one legal outcome": f"""
        SELECT lease_id, COUNT(*) AS num_rows, MIN(outcome) AS outcome FROM leases
        GROUP BY lease_id HAVING COUNT(*) > 1 OR MIN(outcome) NOT IN ({_LEASE_OUTCOMES})""",
    "a finished run has no open lease": """
        SELECT lease_id, prompt_id FROM leases WHERE :finished AND outcome IS NULL""",
    "a lease ends once, with the outcome that its event says": """
        SELECT l.lease_id, l.outcome, GROUP_CONCAT(e.kind) AS events
        FROM leases l LEFT JOIN events e
            ON e.lease_id = l.lease_id AND e.kind IN ('withdrawn','lost','rejected','failed')
        GROUP BY l.lease_id
        HAVING COUNT(e.event_id) <> (l.outcome IS NOT NULL AND l.outcome <> 'done')
            OR (COUNT(e.event_id) = 1 AND MAX(e.kind) <> l.outcome)""",
    "a lease is of a prompt in the ledger": """
        SELECT lease_id, prompt_id FROM leases WHERE prompt_id NOT IN (SELECT prompt_id FROM prompts)""",
    "a lease's attempt is between 1 and max_attempts": """
        SELECT lease_id, prompt_id, attempt FROM leases WHERE attempt NOT BETWEEN 1 AND :max_attempts""",
    "a lease that is done has its group": """
        SELECT lease_id, prompt_id FROM leases
        WHERE outcome = 'done' AND lease_id NOT IN (SELECT lease_id FROM groups)""",
    "what is saved is of a prompt that waits or is leased": """
        SELECT prompt_id FROM partials
        WHERE prompt_id NOT IN (SELECT prompt_id FROM prompts WHERE state IN ('waiting','leased'))""",
    "what is saved has tokens, of weights that are there": """
        SELECT prompt_id, tokens, min_version, max_version FROM partials
        WHERE tokens < 1 OR min_version < 0 OR min_version > max_version
            OR max_version > (SELECT COALESCE(MAX(step), 0) FROM events WHERE kind = 'cut')""",
    # -------------------------------------------------------------------------------------------------------- groups
    "a group is in a legal state": f"""
        SELECT group_id, state FROM groups WHERE state NOT IN ({_GROUP_STATES})""",
    "a finished run has no group without an end": """
        SELECT group_id, state FROM groups WHERE :finished AND state IN ('queued','spare','cut')""",
    "a group answers the lease of its id: prompt, worker, attempt, branch": """
        SELECT g.group_id, g.lease_id, g.prompt_id, l.prompt_id AS lease_prompt_id, g.worker, l.worker AS lease_worker,
            g.attempt, l.attempt AS lease_attempt, l.outcome
        FROM groups g LEFT JOIN leases l ON l.lease_id = g.lease_id
        WHERE g.group_id <> g.lease_id OR l.lease_id IS NULL OR l.outcome IS NOT 'done'
            OR (g.prompt_id, g.worker, g.attempt, g.branch) <> (l.prompt_id, l.worker, l.attempt, l.branch)""",
    "a group has group_size completions": """
        SELECT group_id, completions FROM groups WHERE completions <> :group_size""",
    "a group's versions are in order": """
        SELECT group_id, min_version, max_version FROM groups WHERE min_version < 0 OR min_version > max_version""",
    "a trained group stands in a batch, a cut one in one to come, any other in none": """
        SELECT group_id, state, step FROM groups
        WHERE (state = 'trained' AND (step IS NULL OR step NOT IN (SELECT step FROM batches)))
            OR (state = 'cut' AND (step IS NULL OR step IN (SELECT step FROM batches)))
            OR (state NOT IN ('trained', 'cut') AND reason <> 'run ended' AND step IS NOT NULL)""",
    "staleness is within the bound": """
        SELECT group_id, step, min_version, step - 1 - min_version AS staleness FROM groups
        WHERE state IN ('trained', 'cut') AND step - 1 - min_version > :bound""",
    "no token is newer than the weights that its batch trains": """
        SELECT group_id, step, max_version FROM groups WHERE state IN ('trained', 'cut') AND max_version > step - 1""",
    # ------------------------------------------------------------------------------------------------------- batches
    "there is a batch": """
        SELECT COUNT(*) AS batches FROM batches HAVING COUNT(*) = 0""",
    "batches are steps 1, 2, 3, … without a gap": """
        SELECT step, expected FROM (SELECT step, ROW_NUMBER() OVER (ORDER BY step) AS expected FROM batches)
        WHERE step <> expected LIMIT 1""",
    "batch k is trained on the weights of version k - 1": """
        SELECT step, learner_version FROM batches WHERE learner_version IS NOT step - 1""",
    "a batch has prompts_per_step groups, copies counted": f"""
        SELECT step, groups, {NUM_COPIES} AS num_copies FROM batches b
        WHERE groups + {NUM_COPIES} NOT BETWEEN :batch_min AND :batch_max""",
    "copies are of the batch's own groups": """
        SELECT b.step, c.key AS group_id, c.value AS copies FROM batches b, json_each(b.copies) c
        WHERE c.type <> 'integer' OR c.value < 1 OR NOT EXISTS (SELECT 1 FROM groups g
            WHERE g.group_id = CAST(c.key AS INTEGER) AND g.step = b.step AND g.state = 'trained')""",
    "there are copies under filter.mode: replace only, and they fill the batch": f"""
        SELECT b.step, b.groups, {NUM_COPIES} AS num_copies FROM batches b
        WHERE {NUM_COPIES} > 0 AND (NOT :replaces OR b.groups + {NUM_COPIES} <> :batch_max)
        UNION ALL SELECT step, NULL, number FROM events WHERE kind = 'cut' AND number > 0 AND NOT :replaces""",
    "a batch has as many copies as were cut": f"""
        SELECT b.step, {NUM_COPIES} AS num_copies, e.number AS num_cut
        FROM batches b JOIN events e ON e.kind = 'cut' AND e.step = b.step WHERE e.number IS NOT {NUM_COPIES}""",
    "a batch's counts are those of its trained groups": """
        SELECT b.step, b.groups, COUNT(g.group_id) AS trained_groups, b.tokens, SUM(g.tokens) AS trained_tokens
        FROM batches b LEFT JOIN groups g ON g.step = b.step AND g.state = 'trained'
        GROUP BY b.step HAVING b.groups <> COUNT(g.group_id) OR b.tokens IS NOT SUM(g.tokens)""",
    "a batch's staleness is that of its trained groups": """
        SELECT b.step, b.staleness_max, MAX(b.step - 1 - g.min_version) AS max_of_groups,
            b.staleness_mean, AVG(b.step - 1 - g.min_version) AS mean_of_groups
        FROM batches b JOIN groups g ON g.step = b.step AND g.state = 'trained'
        GROUP BY b.step HAVING b.staleness_max <> MAX(b.step - 1 - g.min_version)
            OR ABS(b.staleness_mean - AVG(b.step - 1 - g.min_version)) > 1e-9""",
    "a batch was cut once, before it was trained": """
        SELECT b.step, COUNT(e.event_id) AS cuts, MAX(e.pos) AS cut_pos, b.trained_pos
        FROM batches b LEFT JOIN events e ON e.kind = 'cut' AND e.step = b.step
        GROUP BY b.step HAVING COUNT(e.event_id) <> 1 OR MAX(e.pos) >= b.trained_pos""",
    # ------------------------------------------------------------------------------------------------------ rollbacks
    "branches are 0, 1, 2, … and the newest goes back to a batch that stands": """
        SELECT n.branch, n.step, n.pos FROM
            (SELECT branch, step, pos, ROW_NUMBER() OVER (ORDER BY branch) - 1 AS expected FROM branches) n
        WHERE n.branch <> n.expected OR (n.branch = (SELECT MAX(branch) FROM branches)
            AND (n.step, n.pos) NOT IN (SELECT 0, 0 UNION ALL SELECT step, trained_pos FROM batches))""",
    "no row is of a branch that never began": """
        SELECT 'leases' AS "table", branch FROM leases WHERE branch NOT IN (SELECT branch FROM branches)
        UNION ALL SELECT 'batches', branch FROM batches WHERE branch NOT IN (SELECT branch FROM branches)
        UNION ALL SELECT 'publishes', branch FROM publishes WHERE branch NOT IN (SELECT branch FROM branches)
        UNION ALL SELECT 'loads', branch FROM loads WHERE branch NOT IN (SELECT branch FROM branches)
        UNION ALL SELECT 'events', branch FROM events WHERE branch NOT IN (SELECT branch FROM branches)""",
    "no group of an earlier branch has a token newer than a rollback went back to": """
        SELECT g.group_id, g.branch, g.max_version, b.branch AS rollback, b.step AS back_to
        FROM groups g JOIN branches b ON g.branch < b.branch WHERE g.max_version > b.step""",
    "no lease of an earlier branch runs, or ended after the checkpoint without a group": """
        SELECT l.lease_id, l.branch, l.outcome, l.ended_pos, b.branch AS rollback, b.pos AS back_to_pos
        FROM leases l JOIN branches b ON l.branch < b.branch
        WHERE l.outcome IS NULL OR (l.outcome <> 'done' AND l.ended_pos > b.pos)""",
    "a batch is of the branch that trained it, and later than the rollbacks it has seen": """
        SELECT t.step, t.branch, b.branch AS rollback, b.step AS back_to FROM batches t JOIN branches b
        WHERE (t.branch < b.branch AND t.step > b.step) OR (t.branch = b.branch AND t.step <= b.step)""",
    "what was published and loaded after the checkpoint of a rollback is undone": """
        SELECT 'publishes' AS "table", p.version, p.pos, b.branch AS rollback
        FROM publishes p JOIN branches b ON p.branch < b.branch WHERE p.pos > b.pos
        UNION ALL SELECT 'loads', p.version, p.pos, b.branch
        FROM loads p JOIN branches b ON p.branch < b.branch WHERE p.pos > b.pos""",
    "what a rollback undid is gone": """
        SELECT 'leases' AS "table", lease_id AS id FROM undone_leases WHERE lease_id IN (SELECT lease_id FROM leases)
        UNION ALL SELECT 'groups', group_id FROM undone_groups WHERE group_id IN (SELECT group_id FROM groups)""",
}
