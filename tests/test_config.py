"""A run file either validates or is refused in one sentence that begins with the key's path."""

import copy
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rsaft.config import TYPES, Custom, json_schema, load_config, objectives, to_dict, validate
from rsaft.config.assemble import component, load_prompts
from rsaft.config.files import merged, parse_overrides
from rsaft.config.sections import Plain
from rsaft.config.settings import load_type
from rsaft.errors import ConfigError
from rsaft.flatten import RSAFT
from rsaft.metrics import Gauge, StopRule
from rsaft.rdrl import DRaFT, Hinge, WeightedSum
from rsaft.sampling import Sampling

CONFIGS = Path(__file__).parent.parent / "configs"
RUNS = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "overlays")
OVERLAYS = sorted((CONFIGS / "overlays").glob("*.yaml"))

BASE: dict[str, Any] = {
    "model": {"path": "testbed:fashion", "lora": {"rank": 4, "alpha": 8.0}, "dtype": "fp32"},
    "prompts": {"train": "testbed:fashion", "eval": None},
    "algorithm": {"type": "draft", "k": 1, "lv": 2, "sampling": {"num_steps": 10, "guidance": 3.0}},
    "rewards": {
        "proxy": {"type": "testbed", "world": "fashion", "name": "reward"},
        "mine": {"type": "a.b:C", "args": {}},
    },
    "objective": {"type": "weighted_sum", "weights": {"proxy": 1.0}},
    "held_out": {"gold": {"type": "testbed", "world": "fashion", "name": "gold"}},
    "step": {"type": "rsaft", "rho": 0.01, "rho_w": 0.01, "mode": "both", "reuse": "resample", "eps_share": 0.5},
    "train": {"steps": 10, "lr": 1e-4, "betas": [0.9, 0.999], "ema": None, "lr_schedule": "constant", "trackers": []},
}


def changed(key: str, value: Any) -> dict[str, Any]:
    """BASE with one key set."""
    result = copy.deepcopy(BASE)
    *parents, last = key.split(".")
    inner = result
    for parent in parents:
        inner = inner[parent]
    inner[last] = value
    return result


def refusal(config: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return path


def test_sections_become_the_dataclasses_beside_the_code():
    config = validate(BASE)
    assert config.algorithm == DRaFT(k=1, lv=2, sampling=Sampling(num_steps=10, guidance=3.0))
    assert config.objective == WeightedSum({"proxy": 1.0})
    assert config.step == RSAFT(rho=0.01, rho_w=0.01, eps_share=0.5)
    assert config.rewards["mine"] == Custom("a.b:C", {})
    assert config.train.betas == (0.9, 0.999)


@pytest.mark.parametrize("path", RUNS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_shipped_run_validates_alone_and_under_every_overlay(path: Path):
    assert isinstance(load_config([path]).step, Plain)
    for overlay in OVERLAYS:
        config = load_config([path, overlay])
        changed = {
            "kl": config.kl is not None,
            "pareto": isinstance(config.objective, objectives.ParetoTransport),
        }
        assert changed.get(overlay.stem, isinstance(config.step, RSAFT))


def test_draft_lv_has_the_settings_of_the_paper():
    config = load_config([CONFIGS / "sd15" / "draft_lv.yaml", CONFIGS / "overlays" / "rsa_ft.yaml"])
    assert (config.algorithm.k, config.algorithm.lv) == (1, 2)
    assert (config.algorithm.sampling.num_steps, config.algorithm.sampling.guidance) == (50, 7.5)
    train = config.train
    assert (train.lr, train.betas, train.weight_decay, train.batch_size) == (2e-5, (0.9, 0.999), 1e-4, 32)
    assert (config.step.rho, config.step.rho_w, config.step.mode) == (0.01, 0.01, "both")


def test_resolved_settings_give_the_same_config_again(tmp_path: Path):
    config = validate(BASE)
    path = write(tmp_path / "config.yaml", to_dict(config))
    assert load_config([path]) == config


def test_the_gauge_is_on_by_default_and_a_bare_off_is_the_word(tmp_path: Path):
    default = validate(BASE)
    assert default.gauge == Gauge()
    assert validate(to_dict(default)) == default
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(BASE) + "gauge:\n  stop: off\n  rule: {patience: 3}\n")  # YAML reads off as false
    assert load_config([file]).gauge == Gauge(stop="off", rule=StopRule(patience=3))
    assert load_config([file], ["gauge.stop=stop"]).gauge.stop == "stop"


def test_a_kl_term_is_there_if_asked_for(tmp_path: Path):
    assert validate(BASE).kl is None
    assert "kl" not in to_dict(validate(BASE))
    path = write(tmp_path / "config.yaml", to_dict(validate(BASE | {"kl": {"weight": 0.5}})))
    assert load_config([path]).kl.weight == 0.5
    assert load_config([path], ["kl=null"]) == validate(BASE)


def test_overlays_merge_and_overrides_come_last(tmp_path: Path):
    base = write(tmp_path / "base.yaml", BASE)
    overlay = write(tmp_path / "overlay.yaml", "train: {steps: 20, lr: 1e-3}\nalgorithm: {k: 1, lv: 0}\n")
    config = load_config([base, overlay], ["train.lr=2e-5", "algorithm.sampling.guidance=1", "train.trackers=[a]"])
    assert (config.train.steps, config.train.lr, config.train.trackers) == (20, 2e-5, ("a",))
    assert config.algorithm == DRaFT(k=1, lv=0, sampling=Sampling(num_steps=10, guidance=1.0))


def test_another_type_replaces_the_whole_section(tmp_path: Path):
    base = write(tmp_path / "base.yaml", BASE)
    overrides = ["objective.margin=0.5", "objective.weights.proxy=2", "objective.type=hinge", "step.type=plain"]
    config = load_config([base], overrides)
    assert config.objective == Hinge({"proxy": 2.0}, margin=0.5)
    assert to_dict(config)["step"] == {"type": "plain"}


def test_null_takes_a_reward_out(tmp_path: Path):
    base = write(tmp_path / "base.yaml", BASE)
    assert list(load_config([base], ["rewards.mine=null", "held_out.gold="]).rewards) == ["proxy"]


def test_merging_changes_neither_part():
    base, overlay = {"a": {"b": 1}}, {"a": {"c": {"d": 2}}}
    result = merged(base, overlay)
    assert result == {"a": {"b": 1, "c": {"d": 2}}}
    assert (base, overlay) == ({"a": {"b": 1}}, {"a": {"c": {"d": 2}}})


def test_yaml_numbers_without_a_point_are_numbers(tmp_path: Path):
    assert load_config([write(tmp_path / "a.yaml", BASE)], ["train.lr=1e-4"]).train.lr == 1e-4


def test_the_network_dtype_of_the_step_is_the_models():
    assert validate(changed("model.dtype", "bf16")).step.network_dtype == "bf16"


def test_a_path_counts_from_the_yaml_first_and_then_from_the_working_directory(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = write(tmp_path / "conf" / "run.yaml", changed("prompts", {"train": "both.txt", "eval": "here.txt"}))
    for name in ("conf/both.txt", "both.txt", "here.txt"):
        write(tmp_path / name, f"{name}\n")
    config = load_config([base])
    assert config.prompts.train == str(tmp_path / "conf" / "both.txt")
    assert config.prompts.eval == str(tmp_path / "here.txt")
    assert load_prompts(config.prompts.train, "train") == ("conf/both.txt",)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("trainn", {}, "config.trainn: unknown key; allowed are model, .*; did you mean 'train'?"),
        ("algorithm.kk", 1, "config.algorithm.kk: unknown key; allowed are k, lv, .*; did you mean 'k'?"),
        ("algorithm.k", 60, "config.algorithm.k: DRaFT keeps .* so 1 <= k <= 10; got 60."),
        ("algorithm.k", "many", "config.algorithm.k: allowed is an integer; got 'many'."),
        ("algorithm.k", 1.5, "config.algorithm.k: allowed is an integer; got 1.5."),
        ("algorithm.k", True, "config.algorithm.k: a number is expected; got true."),
        ("algorithm.type", "draff", "config.algorithm.type: there is no algorithm 'draff'; .*; did you mean 'draft'?"),
        ("algorithm.type", None, "config.algorithm.type: the type is null; allowed are .*, or package.module:Name"),
        ("algorithm", 3, "config.algorithm: a mapping with a 'type' is expected; got 3"),
        (
            "algorithm.sampling",
            3,
            "config.algorithm.sampling: a mapping is expected with the keys num_steps, .*; got 3.",
        ),
        ("algorithm.sampling.num_steps", 0, "config.algorithm.sampling.num_steps: .* num_steps >= 1; got 0."),
        ("algorithm.sampling.stepss", 1, "config.algorithm.sampling.stepss: unknown key; allowed are num_steps, "),
        ("kl", {"weight": 0}, "config.kl.weight: .* so weight > 0; got 0"),
        ("kl", {"weight": 1, "wait": 1}, "config.kl.wait: unknown key; .*did you mean 'weight'?"),
        ("kl", {}, "config.kl.weight: "),
        ("gauge", {"stop": "halt"}, "config.gauge.stop: .*'halt'"),
        ("gauge", {"rule": {"share": 2}}, "config.gauge.rule.*share is a part of the first slope"),
        ("model", None, "config.model: this section is missing"),
        ("model.path", None, "config.model.path: allowed is text; got null."),
        ("model.path", "testbed:fashon", "config.model.path: there is no world 'fashon'; .*; did you mean 'fashion'?"),
        ("model.dtype", "fp23", "config.model.dtype: allowed is 'fp32' or .*; got 'fp23'; did you mean 'fp32'?"),
        ("model.lora.rank", 0, "config.model.lora.rank: .* rank >= 1; got 0."),
        ("model.lora.rnk", 1, "config.model.lora.rnk: unknown key; allowed are rank, .*; did you mean 'rank'?"),
        ("prompts.train", "no.txt", "config.prompts.train: there is no file 'no.txt' .*; allowed are a .txt, "),
        ("prompts.eval", "\0", "config.prompts.eval: there is no file "),
        ("rewards", {}, "config.rewards: at least one reward is needed"),
        ("rewards", {"a/b": {}}, "config.rewards: a reward's name has letters, .*; got 'a/b'."),
        ("rewards.mine.type", "a:b:c", "config.rewards.mine.type: .* package.module:Name; got 'a:b:c'."),
        ("rewards.mine.rho", 1, "config.rewards.mine.rho: unknown key; allowed are type, args"),
        ("rewards.proxy.world", "shape", "config.rewards.proxy.world: .*; got 'shape'; did you mean 'shapes'?"),
        ("objective.weights", {"prox": 1}, "config.objective.weights.prox: there is no such reward; .*'proxy'?"),
        ("objective.weights.proxy", 0, "config.objective.weights: at least one reward needs a weight"),
        ("objective.weights.proxy", "x", "config.objective.weights.proxy: allowed is a number; got 'x'."),
        ("objective.type", "hinge", "config.objective.margin: this key is missing."),
        ("step.rho", -0.1, "config.step.rho: rho is a radius, so rho >= 0.*; got -0.1."),
        ("step.reuse", "rsample", "config.step.reuse: allowed is an integer or 'resample' or 'cached'; .*'resample'?"),
        ("step.eps_share", 2, "config.step.eps_share: .* 0 < eps_share <= 1; got 2.0."),
        ("train", 3, "config.train: a mapping is expected with the keys steps, .*; got 3."),
        ("train.lr", -1, "config.train.lr: .* is larger than 0; got -1.0."),
        ("train.lr", ".nan", "config.train.lr: allowed is a number; got '.nan'."),
        ("train.lr", float("nan"), "config.train.lr: allowed is a finite number; got nan."),
        ("train.betas", [0.9], r"config.train.betas\[1\]: this key is missing."),
        ("train.betas", [0.9, "x"], r"config.train.betas\[1\]: allowed is a number; got 'x'."),
        ("train.betas", [0.9, 0.9, 0.9], "config.train.betas: .* at most 2 items"),
        ("held_out", 0, "config.held_out: a mapping from names to rewards is expected; got 0."),
    ],
)
def test_a_wrong_setting_is_one_sentence_with_path_finding_and_way_out(key: str, value: Any, sentence: str):
    pattern = sentence.replace("?", r"\?").replace("(", r"\(")
    assert re.match(pattern, refusal(changed(key, value)))


def test_a_missing_file_is_named_with_the_nearest_one(tmp_path: Path):
    write(tmp_path / "draft1.yaml", BASE)
    with pytest.raises(ConfigError, match=r"there is no such file; did you mean '.*draft1\.yaml'\?"):
        load_config([tmp_path / "draft.yaml"])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("train: {steps: 1}\ntrain: {lr: 1}\n", "line 2: the key 'train' is given twice"),
        ("a: &x 1\nb: *x\n", "anchors and aliases"),
        ("a: &x [*x]\n", "anchors and aliases"),
        ("train: [", "not YAML that can be read"),
        ("- 1\n", "a mapping of sections is expected"),
        ("1: {}\n", "line 1: a key is plain text; got '1'"),
        ("on: {}\n", "line 1: a key is plain text; got 'on'"),
        ("? [a]\n: 1\n", "line 1: a key is plain text"),
        ("a: !!python/object/apply:os.system ['true']\n", "not YAML that can be read"),
        ("a: 2001-99-99\n", "not YAML that can be read"),
        ("a: " + "9" * 5000, "not YAML that can be read"),
        ("[" * 600, "not YAML that can be read"),
        ("a: \0\n", "not YAML that can be read"),
    ],
)
def test_yaml_that_hides_something_or_cannot_be_read_is_refused(tmp_path: Path, text: str, sentence: str):
    with pytest.raises(ConfigError, match=sentence) as caught:
        load_config([write(tmp_path / "a.yaml", text)])
    assert "\n" not in str(caught.value)


def test_a_config_file_that_is_not_utf8_is_refused(tmp_path: Path):
    (tmp_path / "a.yaml").write_bytes(b"model: caf\xe9\n")
    with pytest.raises(ConfigError, match="not UTF-8 at byte 10"):
        load_config([tmp_path / "a.yaml"])


@pytest.mark.parametrize("overrides", [["train.lr"], ["=3"], ["train..lr=3"], ["a=1", "a.b=2"], ["a=[", "b=1"]])
def test_an_override_that_is_none_is_refused(overrides: list[str]):
    with pytest.raises(ConfigError, match=r"^override '"):
        parse_overrides(overrides)


def test_showing_a_config_imports_none_of_the_users_code(tmp_path: Path, monkeypatch):
    write(tmp_path / "trap.py", "raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert to_dict(validate(changed("rewards.mine.type", "trap:Name")))["rewards"]["mine"]["type"] == "trap:Name"
    assert "trap" not in sys.modules


OWN = """
from dataclasses import dataclass

def sharpness(images, prompts):
    return images.sum(dim=(1, 2, 3))

def factory(scale):
    return lambda images, prompts: scale * sharpness(images, prompts)

@dataclass(frozen=True)
class Settings:
    rho: float = 1.0

number = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch) -> None:
    write(tmp_path / "own_rewards.py", OWN)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("own")
def test_a_function_of_the_users_is_used_itself_and_with_args_it_is_called():
    assert component(Custom("own_rewards:sharpness"), "p").__name__ == "sharpness"
    assert component(Custom("own_rewards:factory", {"scale": 2}), "p").__name__ == "<lambda>"
    assert component(Custom("own_rewards:Settings", {"rho": 2.0}), "p").rho == 2.0


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("custom", "sentence"),
    [
        (Custom("own_reward:sharpness"), "p.type: there is no module 'own_reward'"),
        (Custom("own_rewards:sharpnes"), "p.type: 'own_rewards' has no 'sharpnes'; did you mean 'sharpness'?"),
        (Custom("own_rewards:number"), "p.type: 'own_rewards:number' cannot be called"),
        (Custom("own_rewards:factory", {"scal": 1}), r"p.args: own_rewards:factory\(scale\): "),
        (Custom("own_rewards:Settings", {"rho": 1, "x": 2}), r"p.args: own_rewards:Settings\(.*unexpected .*'x'"),
    ],
)
def test_code_of_the_users_that_does_not_fit_is_named(custom: Custom, sentence: str):
    with pytest.raises(ConfigError, match=sentence.replace("?", r"\?")):
        component(custom, "p")


def test_the_schema_knows_every_key_of_every_built_in_type():
    schema = json_schema()
    json.dumps(schema)
    definitions = schema["$defs"]
    assert list(schema["properties"]) == list(to_dict(validate(BASE | {"kl": {"weight": 1.0}})))
    for kind in TYPES.values():
        for name, path in kind.items():
            cls = load_type(path)
            definition = definitions[cls.__name__]
            assert set(definition["properties"]) == {"type", *cls.__dataclass_fields__}
            assert definition["properties"]["type"] == {"const": name}
            assert definition["additionalProperties"] is False


def test_the_schema_explains_keys_with_the_comments_in_the_code():
    definitions = json_schema()["$defs"]
    assert definitions["DRaFT"]["properties"]["k"]["description"] == "last sampling steps that carry gradient"
    assert "sampled again at theta + eps" in definitions["RSAFT"]["properties"]["reuse"]["description"]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every node below a value."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else [])
    return [p for key, inner in items for p in [(*path, key), *places(inner, (*path, key))]]


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-3, 70),
    st.sampled_from([10**400, -(10**30), 2**63]),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(
        ["1e-4", "0", "nan", "testbed:fashion", "testbed:", "a:b", ":", "plain", "rsaft", "hinge", "\0", "x" * 5000]
    ),
    st.dates(),
    st.binary(max_size=4),
    st.lists(st.integers() | st.text(max_size=3), max_size=4),
    st.dictionaries(st.text(max_size=4) | st.integers(), st.integers() | st.none(), max_size=3),
)


@st.composite
def mutations(draw: st.DrawFn) -> dict[str, Any]:
    """BASE with one to three of: a value replaced, a key dropped, a key misspelt, a key added."""
    config = copy.deepcopy(BASE)
    for _ in range(draw(st.integers(1, 3))):
        if not (choices := places(config)):
            break
        *parents, last = draw(st.sampled_from(choices))
        inner: Any = config
        for parent in parents:
            inner = inner[parent]
        match draw(st.sampled_from(["replace", "drop", "misspell", "add"])):
            case "drop":
                del inner[last]
            case "misspell" if isinstance(inner, dict):
                inner[f"{last}{draw(st.sampled_from('esx_'))}"] = inner.pop(last)
            case "add" if isinstance(inner, dict):
                inner[draw(st.text(max_size=6))] = draw(VALUES)
            case _:
                inner[last] = draw(VALUES)
    return config


def check_mutation(config: dict[str, Any]) -> None:
    """It validates, and then again from what it resolves to; or it is refused in a sentence with a path."""
    sentence = ""
    try:
        validated = validate(config)
        assert validate(to_dict(validated)) == validated
    except ConfigError as error:
        sentence = str(error)
    assert re.match(r"$|config(\.|: )", sentence)
    assert len(sentence) < 1000


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(mutations())
def test_a_mutated_config_validates_or_is_refused_with_its_path(config: dict[str, Any]):
    check_mutation(config)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(mutations())
def test_a_thousand_mutated_configs_validate_or_are_refused_with_their_path(config: dict[str, Any]):
    check_mutation(config)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(max_size=40) | st.text("{}[]:,&*!|>-?%@`'\"# \n\tab1.~", max_size=40))
def test_any_text_is_read_as_yaml_or_refused(text: str):
    sentence = ""
    try:
        parse_overrides([f"a.b={text}"])
    except ConfigError as error:
        sentence = str(error)
    assert sentence == "" or sentence.startswith("override 'a.b=")
