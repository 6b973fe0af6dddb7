"""The report: one file that opens without network, tells the runs' story, and survives runs that were cut off."""

import json
import re

import pytest
from PIL import Image

from rsaft.errors import ConfigError, RsaftError, RunDirectoryError
from rsaft.metrics import write_report
from rsaft.metrics.figures import Line, data_uri, line_chart, tiles
from rsaft.metrics.records import by_prompt, read_run, train_reward, truth
from rsaft.metrics.report import matched_table, shown, signed
from tests.metrics.page import Page, assert_is_self_contained


@pytest.fixture
def two_runs(tmp_path, write_run):
    return [write_run(tmp_path / "plain"), write_run(tmp_path / "rsaft", pace=0.85, shift=0.06)]


def page_of(runs, tmp_path, title="a comparison"):
    return Page(write_report(runs, tmp_path / "report.html", title=title).read_text())


def test_the_page_needs_no_network_and_no_script_and_its_references_are_met(two_runs, tmp_path):
    assert_is_self_contained(write_report(two_runs, tmp_path / "report.html", title="t").read_text())


def test_charts_take_their_colours_from_the_page(two_runs, tmp_path):
    page_of(two_runs, tmp_path)
    text = (tmp_path / "report.html").read_text()
    drawings = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert "var(--run-0)" in drawings
    assert "var(--run-1)" in drawings
    assert not re.search(r"#[ab]\d0000", text)


def test_the_page_shows_start_best_end_and_the_step_of_the_best(two_runs, tmp_path):
    text = re.sub(r"\s+", " ", page_of(two_runs, tmp_path).text)
    assert "gold plain 0.360 0.397 (20) 0.084 −0.276" in text
    assert "rsaft 0.360 0.455 (40) 0.259 −0.101" in text


def test_runs_are_compared_at_matched_reward_sample_by_sample(two_runs):
    runs = [read_run(path) for path in two_runs]
    rows = matched_table(runs)
    assert [row["level"] for row in rows] == [0.25, 0.5, 0.75, 1.0]
    for row in rows:
        mean, low, high = row["differences"][0]
        assert mean == pytest.approx(row["values"][1] - row["values"][0])
        assert low <= mean <= high
        assert mean > 0


def test_samples_of_start_middle_and_end_stand_side_by_side_under_their_prompts(two_runs, tmp_path):
    page = page_of(two_runs, tmp_path)
    assert sum(tag == "img" for tag in page.tags) == 8 * 3 * 2
    for step in (0, 40, 100):
        assert f"update {step}" in page.text
    assert "a photo of a <b>blue</b> bag & more" in page.text
    assert "b" not in [tag for tag in page.tags if tag == "b"][3:]  # only the legend's own bold names


def test_titles_prompts_and_names_are_escaped(tmp_path, write_run):
    run = write_run(tmp_path / "<i>run</i>")
    page = page_of([run], tmp_path, title="<script>alert(1)</script>")
    assert "script" not in page.tags
    assert "i" not in page.tags
    assert "<script>alert(1)</script>" in page.text


def test_settings_that_differ_are_told_from_those_that_are_equal(two_runs, tmp_path):
    text = re.sub(r"\s+", " ", page_of(two_runs, tmp_path).text)
    differing = text[text.index("What differs") : text.index("All settings")]
    assert "step.rho_w – 0.1" in differing
    assert "train.lr" not in differing
    assert "train.lr" in text


def test_counts_of_what_was_not_finite_are_shown(two_runs, tmp_path):
    text = re.sub(r"\s+", " ", page_of(two_runs, tmp_path).text)
    assert "samples masked updates skipped evaluation scores dropped plain 1 0 0 rsaft 1 0 0" in text


def test_the_same_runs_give_the_same_page(two_runs, tmp_path):
    first = write_report(two_runs, tmp_path / "a.html", title="t").read_bytes()
    assert first == write_report(two_runs, tmp_path / "b.html", title="t").read_bytes()
    assert list(tmp_path.glob("*.tmp")) == []


def test_one_run_has_a_report_of_its_own(two_runs, tmp_path):
    page = page_of(two_runs[:1], tmp_path)
    assert "What differs" not in page.text


def test_more_runs_than_colours_are_drawn(tmp_path, write_run):
    runs = [write_run(tmp_path / f"seed{i}", pace=1 + i / 20, steps=40) for i in range(9)]
    assert "seed8" in page_of(runs, tmp_path).text


@pytest.mark.parametrize("lines", [0, 1, 2, 3, 22])
def test_a_run_that_has_just_begun_has_a_report(lines, tmp_path, write_run, two_runs):
    young = write_run(tmp_path / "young")
    metrics = young / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:lines]))
    for file in (young / "samples").iterdir():
        if lines == 0 or int(file.stem.removeprefix("step-")) > 0:
            file.unlink()
    for runs in ([young], [young, two_runs[0]], [two_runs[0], young]):
        assert all(run.name in page_of(runs, tmp_path).text for run in runs)


def test_a_run_directory_with_nothing_but_its_records_has_a_report(tmp_path, write_run):
    run = write_run(tmp_path / "bare")
    for file in [*(run / "samples").iterdir(), run / "config.yaml", run / "env.json"]:
        file.unlink()
    assert "gold" in page_of([run], tmp_path).text


def test_numbers_that_are_missing_or_not_finite_leave_gaps(tmp_path, write_run):
    run = write_run(tmp_path / "gaps")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        if record["kind"] == "eval" and record["step"] in (0, 40):
            record |= {"held_out/gold": None, "nonfinite/held_out/gold": 12, "sharpness/proxy": float("nan")}
        if record["kind"] == "train":
            record |= {"reward/proxy": None, "nonfinite/grad": 1}
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    samples = run / "samples" / "step-000020.json"
    content = json.loads(samples.read_text())
    content["scores"]["held_out/gold"] = [None] * 12
    samples.write_text(json.dumps(content))
    text = re.sub(r"\s+", " ", page_of([run], tmp_path).text)
    assert "gaps 1 100 24" in text
    assert "nan" not in (tmp_path / "report.html").read_text().lower().replace("nano", "")


def test_without_gold_the_mean_held_out_reward_is_the_truth(tmp_path, write_run):
    run = write_run(tmp_path / "run")
    text = (run / "metrics.jsonl").read_text().replace('"held_out/gold"', '"held_out/cnn"')
    (run / "metrics.jsonl").write_text(text)
    assert "Mean held-out reward at the same train reward" in page_of([run], tmp_path).text
    last = read_run(run).evals[-1]
    assert truth(read_run(run))[-1] == pytest.approx((last["held_out/cnn"] + last["held_out/vit"]) / 2)


def test_a_line_that_a_kill_cut_off_is_left_out_and_a_damaged_one_is_named(tmp_path, write_run):
    run = write_run(tmp_path / "run")
    metrics = run / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole[:-30])
    assert len(train_reward(read_run(run))) == 5
    metrics.write_text("{" + whole)
    with pytest.raises(RunDirectoryError, match=r"metrics.jsonl, line 1 is damaged"):
        read_run(run)


def test_what_is_no_run_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="name at least one run"):
        write_report([], tmp_path / "report.html", title="t")
    with pytest.raises(RsaftError, match="holds no metrics"):
        write_report([tmp_path], tmp_path / "report.html", title="t")


def test_the_mean_over_prompts_weighs_every_prompt_once():
    assert by_prompt({("a", 0): 1.0, ("a", 2): 3.0, ("b", 1): 5.0}) == {"a": 2.0, "b": 5.0}


def test_a_grid_is_cut_into_the_tiles_it_was_made_of(tmp_path, write_run):
    grid = write_run(tmp_path / "run", size=16) / "samples" / "step-000000.png"
    cut = tiles(grid)
    assert [tile.size for tile in cut] == [(16, 16)] * 8
    foreign = tmp_path / "foreign.png"
    Image.new("RGB", (40, 20)).save(foreign)
    assert [tile.size for tile in tiles(foreign)] == [(40, 20)]


def test_large_tiles_are_shrunk_and_small_ones_kept_exactly():
    assert data_uri(Image.new("RGB", (32, 32))).startswith("data:image/png")
    large = Image.effect_noise((1024, 1024), 80).convert("RGB")
    assert data_uri(large).startswith("data:image/jpeg")
    assert len(data_uri(large)) < 120_000
    assert large.size == (1024, 1024)


def test_a_chart_of_nothing_is_an_empty_frame():
    svg = line_chart("empty", [Line(0, [], []), Line(1, [0], [float("nan")])], x_label="x", y_label="y", title='<"&>')
    assert svg.startswith("<svg")
    assert 'aria-label="&lt;&quot;&amp;>"' in svg


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (float("nan"), "–"), (0.0, "0.000"), (-0.25, "−0.250"), (12.345, "12.35"), (3e-6, "3.00e−06")],
)
def test_numbers_are_shown_for_reading(value, text):
    assert shown(value) == text


def test_a_change_carries_its_sign():
    assert (signed(0.5), signed(-0.5), signed(0.0), signed(None)) == ("+0.500", "−0.500", "0.000", "–")
