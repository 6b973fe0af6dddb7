"""Which evaluation of a run was the best."""

from rsaft.rdrl.run_result import best_step, evaluation_share


def test_the_best_step_has_the_best_mean_of_the_held_out_rewards():
    evaluations = [
        {"step": 0, "reward/a": 9.0, "held_out/x": 1.0, "held_out/y": 0.0},
        {"step": 5, "reward/a": 0.0, "held_out/x": 0.4, "held_out/y": 0.8},
        {"step": 9, "reward/a": 1.0, "held_out/x": 0.9, "held_out/y": 0.2},
    ]
    assert best_step(evaluations) == 5


def test_without_held_out_rewards_the_train_reward_decides():
    assert best_step([{"step": 0, "reward/a": 1.0}, {"step": 5, "reward/a": 2.0}]) == 5


def test_the_first_of_equally_good_evaluations_is_the_best():
    assert best_step([{"step": 0, "held_out/x": 1.0}, {"step": 5, "held_out/x": 1.0}]) == 0


def test_a_run_without_an_evaluation_has_its_start_as_best():
    assert best_step([]) == 0


def test_the_share_of_evaluations_is_of_updates_and_evaluations(tmp_path):
    lines = [
        '{"step": 0, "evaluation_seconds": 1.0}',
        '{"step": 1, "seconds": 6.0}',
        '{"step": 1, "evaluation_seconds": 1.0}',
    ]
    (tmp_path / "timing.jsonl").write_text("\n".join(lines))
    assert evaluation_share(tmp_path) == 0.25
    (tmp_path / "timing.jsonl").write_text(lines[0])
    assert evaluation_share(tmp_path) is None
