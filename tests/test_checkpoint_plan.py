"""When checkpoints are taken, and which of them are a cluster's own."""

from headwater.machines.checkpoint_plan import CheckpointPlan, own_since


def test_the_next_one_comes_at_a_multiple_after_the_version_of_now():
    plan = CheckpointPlan(10)
    assert [plan.next(version) for version in (0, 9, 10, 11, 25)] == [10, 10, 20, 20, 30]
    assert CheckpointPlan(0).next(25) == 0  # time decides: whatever version that is


def test_each_version_of_a_generation_is_written_once():
    plan = CheckpointPlan(10)
    assert plan.wants(0, 0)
    plan.wrote(0, 20)
    assert not plan.wants(0, 20)
    assert not plan.wants(0, 10)
    assert plan.wants(0, 21)
    assert plan.wants(1, 10)


def test_what_another_training_left_in_the_directory_is_not_its_own():
    assert own_since(resumes=False, first=3) == 3
    assert own_since(resumes=True, first=3) == 0
