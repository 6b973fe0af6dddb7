"""What an evaluation found, for people (Markdown) and for programs (JSON)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rsaft.metrics.paired import MIN_PAIRS
from rsaft.metrics.score_table import Interval, Joint, OfReward, Summary

PAIRED, ALONE = ("pairs", "not finite: tuned + base"), ("images", "not finite")  # last columns of the first table
MAX_CATEGORIES = 20  # rows of the table that is printed; the JSON file holds all


def markdown(found: Summary) -> str:
    """Tables of rewards, joint rates and categories."""
    paired = any(one.base_mean is not None for one in found.rewards.values())
    parts = [_rewards(found.rewards, paired)]
    if found.joint is not None and len(found.rewards) > 1:
        parts.append(_joint(found.joint, len(found.rewards), found.prompts))
    if any(found.unpaired.values()):
        counts = " and ".join(f"{count} of the {role} model" for role, count in found.unpaired.items())
        parts.append(f"Images without a counterpart, left out: {counts}.")
    if found.categories:
        parts.append(_categories(found.categories, tuple(found.rewards), paired))
    return "\n\n".join(parts)


def as_json(found: Summary) -> dict[str, Any]:
    """Every number of the summary; intervals are mean, low, high."""
    joint = found.joint
    return {
        "prompts": found.prompts,
        "unpaired": found.unpaired,
        "rewards": {name: _of_reward(one) for name, one in found.rewards.items()},
        "joint": None
        if joint is None
        else {
            "jdr": _named(joint.jdr),
            "jcr": _named(joint.jcr),
            "ties": joint.ties,
            "pairs": joint.pairs,
            "chance": joint.chance,
        },
        "categories": {
            kind: {name: _of_reward(one) for name, one in rewards.items()} for kind, rewards in found.categories.items()
        },
    }


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns also line up as plain text."""
    cells = [list(head), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def _rewards(rewards: Mapping[str, OfReward], paired: bool) -> str:
    rows = []
    for name, one in rewards.items():
        prompts = len(one.tuned.values)
        lost = " + ".join(str(count) for count in one.nonfinite.values())
        if paired:
            means = [_number(one.tuned.mean), _number(one.base_mean)]
            cells = [*means, _signed(one.tuned.difference, prompts), _share(one.win_rate, prompts), _number(one.ties)]
        else:
            cells = [_number(one.tuned.mean), _between(one.interval, prompts)]
        rows.append([name, *cells, str(prompts), str(one.pairs), lost])
    columns = ["tuned", "base", "difference [95 %]", "win rate [95 %]", "ties"] if paired else ["mean", "[95 %]"]
    return table(["reward", *columns, "prompts", *(PAIRED if paired else ALONE)], rows)


def _joint(joint: Joint, rewards: int, prompts: int) -> str:
    return (
        f"All {rewards} rewards at once, {joint.pairs} pairs: JDR {_share(joint.jdr, prompts)}, "
        f"JCR {_share(joint.jcr, prompts)}, ties {_number(joint.ties)}. Of two equal models and independent "
        f"rewards, each would be {joint.chance:.3g}: read one beside the other."
    )


def _categories(categories: Mapping[str, Mapping[str, OfReward]], names: Sequence[str], paired: bool) -> str:
    rows = []
    for kind, rewards in list(categories.items())[:MAX_CATEGORIES]:
        ones = [rewards[name] for name in names]
        prompts = max(len(one.tuned.values) for one in ones)
        cells = [
            _signed(one.tuned.difference, len(one.tuned.values)) if paired else _number(one.tuned.mean) for one in ones
        ]
        rows.append([kind, str(prompts), *cells])
    title = "Differences by category" if paired else "Means by category"
    more = len(categories) - MAX_CATEGORIES
    rest = f"\n\n{more} more categories are in summary.json." if more > 0 else ""
    return f"{title}:\n\n{table(['category', 'prompts', *names], rows)}{rest}"


def _of_reward(one: OfReward) -> dict[str, Any]:
    mean = one.tuned.mean
    return {
        "mean": mean,
        "interval": None if one.interval is None else _named(one.interval),
        "base_mean": one.base_mean,
        "difference": None if one.tuned.difference is None else _named(one.tuned.difference),
        "win_rate": None if one.win_rate is None else _named(one.win_rate),
        "ties": one.ties,
        "prompts": len(one.tuned.values),
        "pairs": one.pairs,
        "nonfinite": one.nonfinite,
    }


def _named(interval: Interval) -> dict[str, float]:
    return dict(zip(("mean", "low", "high"), interval, strict=True))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _signed(interval: Interval | None, prompts: int) -> str:
    """A difference; with too few prompts, without its interval."""
    if interval is None:
        return "-"
    return f"{interval[0]:+.3g}" + (f" [{interval[1]:+.3g}, {interval[2]:+.3g}]" if prompts >= MIN_PAIRS else "")


def _share(interval: Interval | None, prompts: int) -> str:
    if interval is None:
        return "-"
    return f"{interval[0]:.3f}" + (f" [{interval[1]:.3f}, {interval[2]:.3f}]" if prompts >= MIN_PAIRS else "")


def _between(interval: Interval | None, prompts: int) -> str:
    return "-" if interval is None or prompts < MIN_PAIRS else f"[{interval[1]:.4g}, {interval[2]:.4g}]"
