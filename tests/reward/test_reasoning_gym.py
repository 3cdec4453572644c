"""The verifier `reasoning_gym`. Its library builds one of its parts with a C compiler, so the tests' own install leaves
it out: `pip install -e '.[reasoning-gym]'`, and these run too."""

import json
import re

import pytest

from asyncdapo.reward.registry import make_verifier

reasoning_gym = pytest.importorskip("reasoning_gym", reason="pip install -e '.[reasoning-gym]'")


def entry_of(dataset, **keys):
    return json.loads(json.dumps(reasoning_gym.create_dataset(dataset, size=1, seed=1, **keys)[0]))


def test_reasoning_gym_asks_the_data_sets_own_scorer():
    """Any way to reach the number counts, the entry's own answer being only one."""
    verify, entry = make_verifier("reasoning_gym"), entry_of("countdown")
    answer = json.dumps({"dataset": "countdown", "entry": entry})
    for text in (f"<answer>{entry['answer']}</answer>", f"Answer: {entry['answer']}", f"Answer: ({entry['answer']})"):
        assert verify(f"Let me think.\n{text}", answer)["acc"] == 1.0
    assert verify("<answer>1</answer>", answer)["acc"] < 0.1
    assert verify(entry["answer"], answer)["acc"] < 0.1


def test_reasoning_gym_counts_an_answer_that_its_scorer_cannot_read_as_wrong(monkeypatch):
    def score(answer, entry):
        return float(int(answer) == int(entry["answer"]))

    monkeypatch.setattr(reasoning_gym, "get_score_answer_fn", lambda dataset: score)
    verify = make_verifier("reasoning_gym")
    answers = [json.dumps({"dataset": "mine", "entry": {"question": "", "answer": said}}) for said in ("6", "six")]
    said = [verify(f"Answer: {said}", answers[0]) for said in ("6", "7", "vi")]
    assert [(verdict["acc"], verdict["pred"]) for verdict in said] == [(1.0, "6"), (0.0, "7"), (0.0, "vi")]
    with pytest.raises(ValueError, match="invalid literal for int.*'six'"):
        verify("Answer: 6", answers[1])


@pytest.mark.parametrize("answer", ["6", "{}", "not JSON", '{"dataset": "countdown", "entry": {"answer": "6"}}', "[]"])
def test_reasoning_gym_says_what_the_expected_answer_has_to_be(answer):
    with pytest.raises(ValueError, match='the expected answer is JSON, {"dataset": ….*got ' + re.escape(repr(answer))):
        make_verifier("reasoning_gym")("Answer: 6", answer)


def test_reasoning_gym_takes_the_last_answer_in_tags_before_any_other():
    from asyncdapo.reward.verifiers.reasoning_gym import extract

    assert extract("<answer>5</answer> no: <answer>\n6 </answer>. Answer: 7") == "6"
    assert extract("<answer>5 Answer: 7\n") == "7"
    assert extract("7") is None
