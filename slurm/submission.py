"""Submit once: a submission has a token, by which its job is found though nobody was told that it is in the queue.

    submission = Submission(profile)
    run.write_job(**submission.owner)                            # the intent, before the scheduler hears of it
    with profile_environment(profile):
        job = submission.send(lambda: executor.submit(function))   # or NothingSubmitted, or NoAnswer

`sbatch` may say "Socket timed out" though the job is queued, and a killed command says nothing at all. The token stands
in the job's comment and in its environment: a failed `sbatch` looks for it and adopts the job that is there; a command
that finds a job.json without an id looks for it, too; and the job itself completes job.json when it starts.
"""

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import submitit

from radhpc.core.errors import UserError, first_line
from radhpc.core.ownership.lease import SUBMISSION
from slurm import compat_submitit, scheduler
from slurm.profile import Profile

Submitted = TypeVar("Submitted")

_PAUSES = (1.0, 2.0, 4.0, 8.0)  # seconds between looks: a busy controller queues what it was sent a while ago
# Words of a failure after which the job may be there all the same.
_UNCERTAIN = ("timed out", "timeout", "unable to contact", "connection", "communication", "could not make sense")


class NothingSubmitted(UserError):
    """The scheduler has refused, and no job is in the queue."""


class Submission:
    """One submission, of a job or an array, before and while it is sent."""

    def __init__(self, profile: Profile) -> None:
        self.profile, self.token = profile, secrets.token_hex(8)

    @property
    def owner(self) -> dict[str, Any]:
        """Return the record for job.json: an id is missing until the scheduler has given one."""
        cluster, environment = self.profile.cluster, self.profile.environment
        return {"cluster": cluster, "id": "", "submission": self.token, "environment": environment}

    @property
    def comment(self) -> str:
        """Return the comment of the job: the profile's own, and the token."""
        return " ".join([*filter(None, [str(self.profile.sbatch.get("comment", ""))]), scheduler.comment(self.token)])

    @property
    def export(self) -> str:
        """Return the line of a batch script by which the job knows its submission."""
        return f"export {SUBMISSION}={self.token}"

    def send(self, submit: Callable[[], Submitted]) -> Submitted:
        """Submit, or adopt what an `sbatch` that failed has left in the queue.

        Raises NothingSubmitted, and NoAnswer where nobody says whether a job is there.
        """
        try:
            return submit()
        except FAILURES as error:
            if self.profile.cluster != "slurm":
                raise NothingSubmitted(f"submission failed: {reason(error)}") from error
            job = self._left_behind(error)
            if job is None:
                raise NothingSubmitted(f"submission failed: {reason(error)}") from error
        with compat_submitit.already_submitted(job):
            return submit()

    def _left_behind(self, error: Exception) -> str | None:
        """Return the id of this submission's job where it is in the queue. Raises NoAnswer."""
        uncertain = any(word in str(error).lower() for word in _UNCERTAIN)
        unanswered: scheduler.NoAnswer | None = None
        for pause in (*_PAUSES, 0.0):
            try:
                if jobs := scheduler.find(self.token, self.profile.environment):
                    return jobs[0]
                if not uncertain:
                    return None
                unanswered = None
            except scheduler.NoAnswer as problem:
                unanswered = problem
            time.sleep(pause)
        if unanswered is not None:
            raise scheduler.NoAnswer(
                f"submission failed: {reason(error)}; and nobody says whether its job is queued ({unanswered}): the "
                f"same command, said again, looks for it by its comment {scheduler.comment(self.token)}"
            ) from error
        return None


FAILURES = (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError, RuntimeError)


@contextlib.contextmanager
def refusals_as_user_errors() -> Iterator[None]:
    """Turn a scheduler's refusal into one line."""
    try:
        yield
    except FAILURES as error:
        raise UserError(f"submission failed: {reason(error)}") from error


def reason(error: Exception) -> str:
    """Return sbatch's message without its banner."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    messages = [line.removeprefix("sbatch: error: ") for line in lines if line.startswith("sbatch: error: ")]
    return "; ".join(messages) or first_line(error)


def ignored_shell_options() -> list[str]:
    """Return what this shell would change in a submission by variables, and does not: options belong to the profile."""
    return sorted(name for name in os.environ if name.startswith("SBATCH_"))
