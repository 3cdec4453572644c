"""Classes of other frameworks: the same episode as there."""

from __future__ import annotations

from asyncdapo.model.tool_calls import ToolCall
from tests.asynchronous import asynchronous
from tests.environment.hosting import SHAPES, hosting, scripted

ROW = {"prompt": "Reach 5.", "answer": "5", "source": "counts", "row": 0}


def add(number: int) -> ToolCall:
    return ToolCall("add", {"number": number})


def tool(content: str) -> dict[str, str]:
    return {"role": "tool", "name": "add", "content": content}


@asynchronous
async def test_a_class_of_trls_is_reset_with_the_row_and_asked_for_its_reward_at_the_end() -> None:
    async with hosting(f"{SHAPES}:Counter") as hosts:
        play = scripted([add(2), add(3)], "done")
        assert await hosts.in_environment(ROW, play) == [
            None,
            [tool("the counter is at 2"), tool("the counter is at 5")],
            None,
            1.0,
            {},
        ]
        assert await hosts.in_environment(ROW | {"row": 1}, scripted("done")) == ["Reach 5. Count!", None, 0.0, {}]


@asynchronous
async def test_a_class_of_skyrls_gets_the_answer_as_its_reward_spec_and_is_closed() -> None:
    async with hosting(f"{SHAPES}:Guess") as hosts:
        said = await hosts.in_environment(ROW, scripted("4", "5"))
        assert said == [
            [{"role": "system", "content": "Guess."}, {"role": "user", "content": "Reach 5."}],
            [{"role": "user", "content": "not 4"}],
            None,
            1.0,
            {"turns": 2, "closed_before": 0},
        ]
        said = await hosts.in_environment(ROW, scripted("5"))
        assert said[-1] == {"turns": 1, "closed_before": 1}
