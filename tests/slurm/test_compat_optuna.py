"""What slurm/compat_optuna.py takes from optuna is still there and does what radhpc relies on."""

from pathlib import Path

import optuna
import pytest
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from slurm import compat_optuna


@pytest.fixture
def storage(tmp_path: Path) -> optuna.storages.JournalStorage:
    """A journal with a study of three trials that wait."""
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(tmp_path / "journal.log")))
    study = optuna.create_study(study_name="sweep", storage=storage)
    for _ in range(3):
        study.enqueue_trial({})
    return storage


def study_of(storage: optuna.storages.JournalStorage) -> optuna.Study:
    return optuna.load_study(study_name="sweep", storage=storage, sampler=optuna.samplers.RandomSampler(seed=3))


def trial(storage: optuna.storages.JournalStorage, number: int) -> FrozenTrial:
    return study_of(storage).get_trials(deepcopy=False)[number]


def test_a_trial_is_claimed_by_its_number_and_again_with_what_it_had_drawn(
    storage: optuna.storages.JournalStorage, tmp_path: Path
) -> None:
    assert compat_optuna.trial_id(trial(storage, 2)) == 2
    claimed = compat_optuna.claim(study_of(storage), storage, trial(storage, 2))
    drawn = claimed.suggest_float("rate", 0.0, 1.0)
    assert [trial(storage, number).state for number in range(3)] == [
        TrialState.WAITING,
        TrialState.WAITING,
        TrialState.RUNNING,
    ]
    other = optuna.storages.JournalStorage(JournalFileBackend(str(tmp_path / "journal.log")))  # another process
    again = compat_optuna.claim(study_of(other), other, trial(other, 2))
    assert again.suggest_float("rate", 0.0, 1.0) == drawn
    assert trial(storage, 2).state == TrialState.RUNNING


def test_values_and_attributes_are_stored_without_the_trials_object(storage: optuna.storages.JournalStorage) -> None:
    compat_optuna.claim(study_of(storage), storage, trial(storage, 1))
    compat_optuna.report(storage, trial(storage, 1), 50, 0.25)
    compat_optuna.set_attribute(storage, trial(storage, 1), "pruned_at", 50)
    assert trial(storage, 1).intermediate_values == {50: 0.25}
    assert trial(storage, 1).user_attrs == {"pruned_at": 50}
    study_of(storage).tell(1, state=TrialState.PRUNED)
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):  # slurm.sweep.study suppresses it
        compat_optuna.report(storage, trial(storage, 1), 60, 0.2)
