"""Teacher prompts: a teacher reads them instead of the policy's prompts, with text that the policy does not see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from upge.data.encode import Example
from upge.data.prompting import Prompting, format_fields
from upge.data.splits import Problem
from upge.errors import ConfigError, DataError, nearest

#: What a teacher's template may hold.
FIELDS = ("prompt", "demonstration", "answer", "feedback")


class TeacherPrompts:
    """Writes the teacher's prompts. They replace the prompt in the model's own template.

    Args:
        prompting: the policy's.
        template: a text with {prompt}, and {demonstration} (the problem's first), {answer} (its ground truth) or
            {feedback} (a right response to the same prompt by another rollout; empty where there is none).

    Raises:
        ConfigError: the template is not such a text.
    """

    def __init__(self, prompting: Prompting, template: str) -> None:
        self.fields = format_fields(template, "teacher.template")
        for name in self.fields - set(FIELDS):
            raise ConfigError(
                f"{template!r} has the unknown field '{{{name}}}'; {nearest(name, FIELDS)}", "teacher.template"
            )
        if "prompt" not in self.fields:
            raise ConfigError(
                f"{template!r} has no {{prompt}}; the teacher would not see the problem", "teacher.template"
            )
        self._prompting, self._template = prompting, template
        self._known: dict[tuple[str, Sequence[int]], tuple[int, ...]] = {}

    def check(self, problems: Sequence[Problem]) -> None:
        """Check that the problems have what the template holds.

        Raises:
            DataError: a problem lacks it.
        """
        for field, has in (("demonstration", lambda p: p.demonstrations), ("answer", lambda p: p.answer is not None)):
            missing = [p for p in problems if not has(p)] if field in self.fields else []
            if missing:
                raise DataError(
                    f"teacher.template: it holds {{{field}}}, and {len(missing)} of {len(problems)} training problems "
                    f"have none, the first at {missing[0].where or missing[0].id}; use data that has it"
                )

    def ids(self, example: Example, feedback: Sequence[int] = ()) -> tuple[int, ...]:
        """The token ids of the teacher's prompt.

        Args:
            example: an example of the training set.
            feedback: the tokens of a right response, or none.
        """
        problem = example.problem
        known = problem.id, tuple(feedback)
        if known not in self._known:
            if len(self._known) > 100_000:
                self._known.clear()
            text = self._template.format(
                prompt=problem.prompt,
                demonstration=problem.demonstrations[0] if problem.demonstrations else "",
                answer=problem.answer,
                feedback=self._prompting.decode([feedback])[0] if feedback else "",
            )
            self._known[known] = self._prompting.prompt_ids([replace(problem, prompt=text)])[0]
        return self._known[known]
