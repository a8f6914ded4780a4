"""When a run is saved, and what follows the save of an epoch's end."""

from spark_fast.checkpoint.file import read_run
from spark_fast.checkpoint.manager import CheckpointManager, published
from spark_fast.training.checkpointer import Checkpointer


def manager(folder):
    return CheckpointManager(folder, keep_last=2, keep_steps=0)


def test_a_save_holds_the_step_it_was_asked_at(make_state, tmp_path):
    state = make_state()
    checkpointer = Checkpointer(state, manager(tmp_path))
    state.position.step = 2
    checkpointer.save()
    state.position.step = 3  # the next step is taken while it is written
    checkpointer.finish()
    assert list(published(tmp_path)) == [2]
    assert read_run(checkpointer.last)["step"] == 2


def test_what_follows_an_epochs_save_is_given_the_checkpoint_and_follows_no_other(make_state, tmp_path):
    state, given = make_state(), []
    checkpointer = Checkpointer(state, manager(tmp_path), after_epoch=lambda content: given.append(content["step"]))
    for step in (2, 3, 5, 6):
        state.position.step = step
        checkpointer.save()
    checkpointer.finish()
    assert given == [3, 6]


def test_saves_fall_due_by_steps(make_state, tmp_path):
    state = make_state()
    checkpointer = Checkpointer(state, manager(tmp_path), steps=4)
    due = []
    for state.position.step in range(1, 10):
        due.append(checkpointer.due())
        if due[-1]:
            checkpointer.save()
            checkpointer.wait()
    assert [step for step, yes in enumerate(due, 1) if yes] == [4, 8]


def test_a_rank_that_does_not_write_is_never_due_and_leaves_nothing(make_state, tmp_path):
    state = make_state()
    checkpointer = Checkpointer(state, None, steps=1)
    state.position.step = 3
    assert not checkpointer.due()
    checkpointer.save()
    checkpointer.finish()
    assert checkpointer.last is None
