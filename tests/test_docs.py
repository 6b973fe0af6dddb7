"""The pages of docs/ are true: their code runs, every logged key is explained, and every equation leads to code."""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch

import rsaft
from rsaft.flatten import RSAFT
from rsaft.rdrl import DRaFT, WeightedSum
from tests.helpers import PROMPTS, toy_reward

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
RUN = ("quickstart", "add_a_reward", "add_a_backbone", "add_a_trainer")
PAPERS = sorted(DOCS.glob("paper_*.md"))

BLOCK = re.compile(r"^```(python|yaml)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE_NAME = re.compile(r"# ([\w.]+\.(?:py|yaml))\n")  # the first line of a block that a reader saves
LINK = re.compile(r"\[`([\w.]+)`\]\(\.\./((?:rsaft|tests)/[\w/]+\.py)\)")


def text_of(page: str) -> str:
    return (DOCS / f"{page}.md").read_text(encoding="utf-8")


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory of a reader who begins; what the page's files define is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("my_"):
            del sys.modules[name]


@pytest.mark.parametrize("page", RUN)
def test_the_code_of_a_page_runs_from_top_to_bottom(page: str, empty_folder: Path):
    """Every python block, in one namespace; a block whose first line names a file is saved under that name."""
    namespace = {"__name__": "page"}
    blocks = BLOCK.findall(text_of(page))
    assert any(language == "python" for language, _ in blocks)
    for number, (language, code) in enumerate(blocks):
        if name := FILE_NAME.match(code):
            (empty_folder / name[1]).write_text(code, encoding="utf-8")
        if language == "python":
            exec(compile(code, f"{page}.md, block {number}", "exec"), namespace)


def judge(images: torch.Tensor, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
    """Two parts, one of which is never finite."""
    return {"fair": images.mean((1, 2, 3)), "broken": images.mean((1, 2, 3)) / 0}


def general(key: str) -> str:
    """A key as the page writes it."""
    if key.startswith("nonfinite/") and key not in ("nonfinite/reward", "nonfinite/grad"):
        return "nonfinite/KEY"
    key = re.sub(r"^gauge/image/\w+$", "gauge/image/STATISTIC", key)
    return re.sub(r"/(one|two|other)$", "/NAME", key.replace("judge/fair", "NAME/PART"))


@pytest.fixture(scope="module")
def written_keys(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """The keys that one tiny run writes into each file, in the page's general form."""
    run = tmp_path_factory.mktemp("keys") / "run"
    rsaft.Trainer(
        rsaft.load_backbone(tiny_sd, lora=rsaft.LoRA(rank=2)),
        algorithm=DRaFT(k=1, sampling=rsaft.Sampling(num_steps=2, guidance=1.0)),
        rewards={"one": toy_reward, "two": toy_reward},
        objective=WeightedSum({"one": 1.0, "two": 1.0}),
        step=RSAFT(network_dtype="bf16", sharpness_tau=1.0),
        prompts=PROMPTS,
        held_out={"other": lambda images, prompts: images.mean((1, 2, 3))},
        measures={"judge": judge},
        config=rsaft.TrainConfig(steps=1, batch_size=2, eval_samples=2, sharpness_rho=0.1),
        run_dir=run,
    ).fit()

    def keys(path: Path) -> set[str]:
        records = [json.loads(line) for line in path.read_text().splitlines()]
        return {general(key) for record in records for key in record}

    samples = json.loads((run / "samples" / "step-000001.json").read_text())
    return {
        "metrics.jsonl": keys(run / "metrics.jsonl"),
        "timing.jsonl": keys(run / "timing.jsonl"),
        "samples/step-XXXXXX.json": set(samples),
    }


def explained_keys(heading: str) -> set[str]:
    """The keys in the first column of the tables under the headings that begin so."""
    sections = [part for part in text_of("logged_keys").split("\n## ") if part.startswith(heading)]
    assert sections, f"logged_keys.md has no section {heading}"
    return set(re.findall(r"^\| `([^`]+)` \|", "\n".join(sections), re.MULTILINE))


@pytest.mark.parametrize("file", ["metrics.jsonl", "timing.jsonl", "samples/step-XXXXXX.json"])
def test_every_key_that_a_run_writes_is_explained(file: str, written_keys: dict[str, set[str]]):
    assert len(written_keys[file]) > 1
    assert written_keys[file] - explained_keys(file) == set()


def test_every_key_that_is_explained_is_in_the_code():
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "rsaft").rglob("*.py"))
    fixed = {key: [part for part in key.split("/") if not part.isupper()] for key in explained_keys("metrics.jsonl")}
    assert {key for key, parts in fixed.items() if parts[-1] not in code} == set()


@pytest.mark.parametrize("page", PAPERS, ids=lambda path: path.stem)
def test_a_papers_page_leads_to_functions_and_tests_that_exist(page: Path):
    links = LINK.findall(page.read_text(encoding="utf-8"))
    functions = [(name, path) for name, path in links if path.startswith("rsaft/")]
    tests = [(name, path) for name, path in links if path.startswith("tests/")]
    assert functions
    assert tests
    for name, path in functions:
        module, _, attribute = name.rpartition(".")
        found = resolve_name(f"{module}:{attribute}")
        assert Path(sys.modules[found.__module__].__file__) == ROOT / path, f"{name} is not in {path}"
    for name, path in tests:
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), f"{path} has no test {name}"


@pytest.mark.parametrize("page", PAPERS, ids=lambda path: path.stem)
def test_every_file_that_a_papers_page_names_exists(page: Path):
    named = re.findall(r"(?:rsaft|tests|examples|configs)/[\w/.]+\.(?:py|yaml)", page.read_text(encoding="utf-8"))
    assert named
    assert [path for path in named if not (ROOT / path).is_file()] == []


def test_the_notebook_is_committed_without_outputs_and_its_code_is_python():
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert cells
    for cell in cells:
        assert (cell["outputs"], cell["execution_count"]) == ([], None)
        compile("".join(cell["source"]), cell["id"], "exec")
