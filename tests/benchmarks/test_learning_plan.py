"""The plan of the evidence: what is run after what, with which rates, until nothing is left."""

from dataclasses import replace

import pytest


@pytest.fixture
def learning_plan():
    import learning_plan

    return learning_plan


@pytest.fixture
def options(learning_plan):
    from learning_forms import parse

    return parse(["--form", "evidence", "--data", "x", "--out", "y"])


def finish(learning_plan, options, rows, most=10_000):
    """Finish the runs one by one in the plan's order, as one process would; returns their jobs."""
    done, before = [], -1
    while before < len(done) < most:
        before = len(done)
        for job in learning_plan.plan(options, rows):  # which looks at the rows as it goes
            if job.key not in rows and len(done) < most:
                rows[job.key] = {"key": job.key, **job.about, **made_up(job)}
                done.append(job)
    return done


def made_up(job):
    """Results: the rates 8e-3 and 1e-2 are the best, FCMAE's step takes half of SparK's seconds."""
    if job.does == "step_costs":
        return {"of": {name: 0.4 if name == "as published" else 0.2 for name in job.run}, "loading": 0.01}
    if job.does == "pretrain":
        lower = {"zero-outing": 3.0, "mask 0.25": 0.1 * (-1) ** job.run.seed}.get(job.about["arm"], 0.0)
        steps = 390 * job.run.epochs
        top1 = 40 + job.run.seed + (job.run.lr == 8e-3) - lower
        return {"loss": 0.4, "steps": steps, "knn": [[0, 25.0 + job.run.seed], [steps, top1]]}
    scratch = 5.0 if job.run.before is None else 0.0
    return {"top1": 50 + 10 * (job.run.share == 0.1) + job.run.seed + (job.run.lr == 1e-2) - scratch}


def test_all_runs_of_the_plan_are_reached_and_counted(learning_plan, options):
    rows = {}
    done = finish(learning_plan, options, rows)
    assert len(done) == len(rows) == learning_plan.expected(options)
    pretrained = [job for job in done if job.does == "pretrain" and job.run.judged == "test"]
    assert len(pretrained) == 13 * 3
    assert {job.run.lr for job in pretrained} == {8e-3}, "the rate that did best on training images"
    finetuned = [job for job in done if job.does == "finetune" and not job.run.held_out]
    assert len(finetuned) == 14 * 3 * 2
    assert {job.run.lr for job in finetuned} == {1e-2}
    assert all(job.run.before is None or job.run.before.seed == job.run.seed for job in finetuned)


def test_at_sparks_seconds_a_cheaper_step_buys_more_passes(learning_plan, options):
    rows = {}
    finish(learning_plan, options, rows)
    epochs = {row["arm"]: row["run"]["epochs"] for row in rows.values() if row.get("arm") and "loss" in row}
    assert epochs["as published"] == epochs["FCMAE"] == 10
    assert epochs["FCMAE, SparK's seconds"] == epochs["FCMAE x 4, SparK's seconds"] == 20
    assert learning_plan.passes(options, {}, "FCMAE") is None
    costs = {learning_plan.STEPS: {"of": {"as published": 0.29, "FCMAE": 0.2}}}
    assert learning_plan.passes(options, costs, "FCMAE") == 14
    assert learning_plan.passes(replace(options, in_memory=True), costs, "FCMAE") == 15, "five evaluations, three each"


def test_an_arm_that_comes_to_the_run_of_another_waits_for_it(learning_plan, options):
    rows = {learning_plan.STEPS: {"of": dict.fromkeys(learning_plan.TIMED, 0.4)}}
    finish(learning_plan, options, rows)
    name = "FCMAE, SparK's seconds"
    own = {key: row["run"] for key, row in rows.items() if row.get("arm") == name and "loss" in row}
    equal = [key for key, row in rows.items() if row.get("arm") == "FCMAE" and row.get("run") in own.values()]
    assert len(own) == len(equal) == 3
    del rows[equal[0]]
    open_now = [job for job in learning_plan.plan(options, rows) if job.does == "pretrain" and job.about["arm"] == name]
    assert [job.run.seed for job in open_now] == [1, 2]


def test_what_matters_most_comes_first_with_all_its_seeds(learning_plan, options):
    done = finish(learning_plan, options, {})
    order = [(job.about["arm"], job.run.seed) for job in done if job.does == "pretrain" and job.run.judged == "test"]
    assert order[:6] == [(arm, seed) for arm in ("as published", "zero-outing") for seed in range(3)]
    assert order[-9:] == [(arm, seed) for arm in ("mask 0.75", "decoder 64", "decoder 16") for seed in range(3)]


def test_nothing_is_tuned_by_test_images_or_by_the_seeds_of_results(learning_plan, options):
    done = finish(learning_plan, options, {})
    tuned = [job for job in done if job.about.get("arm", "").endswith((" tuned", " swept"))]
    assert len(tuned) == 11 * 3 + 12 * 2 * 3
    assert all(job.run.seed == 3 for job in tuned)
    assert all(job.run.judged == "tuning" if job.does == "pretrain" else job.run.held_out for job in tuned)


def test_after_an_end_of_the_process_the_plan_goes_on_with_the_first_run_that_is_missing(learning_plan, options):
    rows = {}
    before = finish(learning_plan, options, rows, most=30)
    whole = finish(learning_plan, options, {})
    assert whole[:30] == before
    assert finish(learning_plan, options, rows) == whole[30:]
    more = finish(learning_plan, replace(options, seeds=6), rows)
    assert len(more) == 14 * 3 * 2, "more fine-tunings of the same pre-trainings are just those"


def test_the_form_of_one_gpu_has_what_fits_and_tunes_it_alone(learning_plan):
    from learning_forms import parse

    options = parse(["--form", "evidence_gpu", "--data", "x", "--out", "y"])
    rows = {}
    done = finish(learning_plan, options, rows)
    assert len(done) == learning_plan.expected(options) == 1 + 8 * 3 + 9 * 3 * 2 + 9 * 3 + 10 * 3 * 2
    assert {row["run"]["epochs"] for row in rows.values() if row.get("arm") == "as published" and "loss" in row} == {
        100
    }
    assert "FCMAE x 4" not in {row.get("arm") for row in rows.values()}
    own = [job.run for job in done if job.about.get("arm") == "FCMAE x 4 swept"]
    assert {run.before.epochs for run in own} == {200}, "on the encoder that it has after SparK's seconds"
    assert {run.before.seed for run in own} == {0}
    others = [job.run for job in done if job.about.get("arm") == "FCMAE swept"]
    assert {run.before.epochs for run in others} == {100}


def test_a_form_may_have_some_of_the_arms(learning_plan):
    from learning_forms import parse

    options = parse(["--form", "evidence_resnet18", "--data", "x", "--out", "y"])
    rows = {}
    finish(learning_plan, options, rows)
    assert len(rows) == learning_plan.expected(options) == 1 + 3 + 3 * 2 * 2 + 3 + 3 * 2 * 2
    assert {row["arm"] for row in rows.values() if "top1" in row} == {
        "scratch",
        "as published",
        "scratch swept",
        "as published swept",
    }
