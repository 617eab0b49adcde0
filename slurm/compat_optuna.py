"""Collect what radhpc takes from optuna that optuna does not promise to keep.

    study = optuna.load_study(...)
    frozen = study.get_trials(deepcopy=False)[7]
    trial = claim(study, storage, frozen)      # an optuna.Trial: suggests what was drawn, or draws

Optuna's public interface hands out any waiting trial (Study.ask) and reports through the object that it handed out. A
job of a sweep asks for one trial by its number and comes back to it after a preemption, in another process. That takes
the storage's own methods, by the private id of a trial. Nothing else in radhpc names these. Each function says what to
do when a new optuna no longer has it, and tests/slurm/test_compat_optuna.py says so first.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import optuna


def trial_id(frozen: "optuna.trial.FrozenTrial") -> int:
    """Return the id by which a storage knows a trial.

    Wraps FrozenTrial._trial_id. When it is gone: the journal is of one study alone, whose ids are the numbers of its
    trials, so return `frozen.number`.
    """
    return int(frozen._trial_id)


def claim(
    study: "optuna.Study", storage: "optuna.storages.BaseStorage", frozen: "optuna.trial.FrozenTrial"
) -> "optuna.Trial":
    """Return this very trial as Study.ask would return the next one; one that waits becomes a running one.

    Wraps BaseStorage.set_trial_state_values and the constructor optuna.Trial(study, id), which Study.ask calls. When
    they are gone: enqueue the trials one at a time under the journal's lock, so that Study.ask hands out the right one.
    """
    from optuna.trial import Trial, TrialState

    if frozen.state == TrialState.WAITING:
        storage.set_trial_state_values(trial_id(frozen), TrialState.RUNNING)
    return Trial(study, trial_id(frozen))


def report(storage: "optuna.storages.BaseStorage", frozen: "optuna.trial.FrozenTrial", step: int, value: float) -> None:
    """Store an intermediate value of a running trial.

    Wraps BaseStorage.set_trial_intermediate_value. When it is gone: `claim` the trial and call its `report`, which
    warns about a step that was reported before.
    """
    storage.set_trial_intermediate_value(trial_id(frozen), step, value)


def set_attribute(
    storage: "optuna.storages.BaseStorage", frozen: "optuna.trial.FrozenTrial", key: str, value: Any
) -> None:
    """Store an attribute of a running trial, for `frozen.user_attrs`.

    Wraps BaseStorage.set_trial_user_attr. When it is gone: `claim` the trial and call its `set_user_attr`.
    """
    storage.set_trial_user_attr(trial_id(frozen), key, value)
