"""`report.md`: what the parts have shown so far, written anew after each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .parts import STEPS_A_TURN
from .runner import Result

GIB = 2**30
# The paper's claims (arXiv:2512.15764), and the bars that were set for the first card: ratios to plain DeepSpeed.
CLAIMED_TIME, CLAIMED_MEMORY = 0.88, 0.65
EXPLOIT_BAR, EXPLORE_BAR, POOL_BAR = 0.70, 1.05, 1.1


def report(results: Sequence[Result], machine: Mapping[str, Any]) -> str:
    """Return the page, in Markdown."""
    lines = ["# gpu-check", "", *(f"- {name}: {value}" for name, value in machine.items()), ""]
    lines += ["| part | | outcome | seconds |", "|---|---|---|---|"]
    lines += [f"| {r.part.name} | {r.part.about} | {r.outcome} | {r.seconds:.0f} |" for r in results]
    lines += ["", *_bars(results)]
    for result in results:
        if result.outcome == "not started":
            continue
        lines += ["", f"## {result.part.name}", "", *_SECTIONS.get(result.part.name, _plain)(result)]
        if result.outcome != "ok":
            lines += ["", f"The log's end (`{result.part.name}.log`):", "", "```", result.tail.strip(), "```"]
    return "\n".join(lines) + "\n"


def _plain(result: Result) -> Iterator[str]:
    last = [line for line in result.tail.splitlines() if line.strip()][-1:]
    yield from (f"    {line}" for line in last)


def _table(cases: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield one row for each case, with its numbers and strings as columns."""
    names = list(dict.fromkeys(name for case in cases for name, value in case.items() if not isinstance(value, dict)))
    yield f"| {' | '.join(names)} |"
    yield f"|{'---|' * len(names)}"
    for case in cases:
        yield f"| {' | '.join(_shown(case.get(name)) for name in names)} |"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def _cases(result: Result) -> Iterator[str]:
    yield from _table(result.cases)


def _memory(result: Result) -> Iterator[str]:
    yield (
        "GiB, except ratios. *Estimate*: between steps, without activations and gradients. *Full*: "
        "plain DeepSpeed with the same model."
    )
    yield ""
    yield "| case | outcome | peak allocated | between steps | estimate | peak reserved | pinned | peak / full |"
    yield "|---|---|---|---|---|---|---|---|"
    full = {case["case"].split("/")[0]: case for case in result.cases if case["case"].endswith("/full")}
    for case in result.cases:
        if case["outcome"] != "ok":
            yield f"| {case['case']} | {case['outcome']}: {case.get('reason', '')} | | | | | | |"
            continue
        base = full.get(case["case"].split("/")[0], {}).get("peak_allocated_bytes")
        estimated = case["estimate"]["between_steps"]
        pinned = case["pinned_bytes"].get("allocated_bytes.current", 0)  # "active" never falls (torch 2.11)
        numbers = (
            case["peak_allocated_bytes"],
            case["allocated_bytes"],
            estimated,
            case["peak_reserved_bytes"],
            pinned,
        )
        ratio = f"{case['peak_allocated_bytes'] / base:.2f}" if base else ""
        yield f"| {case['case']} | ok | {' | '.join(f'{n / GIB:.2f}' for n in numbers)} | {ratio} |"
    yield ""
    yield f"The paper claims 35 % less memory: a ratio of {CLAIMED_MEMORY} at 20 %."


def _time(result: Result) -> Iterator[str]:
    yield (
        f"Each row and plain DeepSpeed took turns of {STEPS_A_TURN} steps, in one process; ratios are medians over "
        "pairs of turns."
    )
    yield ""
    yield from _table(result.cases)
    yield ""
    yield f"The paper claims 12 % less time: {CLAIMED_TIME}. Bars: exploit {EXPLOIT_BAR}, explore {EXPLORE_BAR}."


def _floor(result: Result) -> Iterator[str]:
    modes: list[dict[str, Any]] = list((result.data or {}).get("offload", {}).values())
    rows: dict[str, Any] = modes[0].get("rows", {}) if modes else {}
    yield "| row | step / plain | tokens a second | step seconds |"
    yield "|---|---|---|---|"
    for name, row in rows.items():
        ratio, seconds = row["step_to_plain"]["median"], row["seconds"]["step"]["median"]
        yield f"| {name} | {ratio:.2f} | {row['tokens_per_second']:.0f} | {seconds:.4f} |"
    yield ""
    yield "`floor-20` is a hand-written loop that does the necessary work for the blocks of `exploit-20` and no other."


def _transfers(result: Result) -> Iterator[str]:
    yield from _table([case for case in result.cases if "table" not in case])
    for case in result.cases:
        if "table" in case:
            yield from (
                "",
                "The table of docs/transfers.md with the rates measured here:",
                "",
                *case["table"],
            )


def _bars(results: Sequence[Result]) -> Iterator[str]:
    """Yield what was claimed, and the bars that were set for the first card, beside what was measured."""
    cases = {(r.part.name, case["case"].split("/")[-1]): case for r in results for case in reversed(r.cases)}
    peaks = {row: cases.get(("memory", row), {}).get("peak_allocated_bytes") for row in ("full", "exploit-20")}
    in_memory = peaks["exploit-20"] / peaks["full"] if peaks["exploit-20"] and peaks["full"] else None
    exploit, explore = (cases.get(("time", f"{phase}-20"), {}).get("step_to_plain") for phase in ("exploit", "explore"))
    pool = cases.get(("memory", "exploit-20"), {}).get("pool_to_budget")
    yield "| at 20 %, of plain DeepSpeed's | at most | measured |"
    yield "|---|---|---|"
    for what, bar, measured in (
        ("exploit step, the paper's claim (12 % faster)", CLAIMED_TIME, exploit),
        ("exploit step, our bar", EXPLOIT_BAR, exploit),
        ("explore step, our bar", EXPLORE_BAR, explore),
        ("peak memory, the paper's claim (35 % less)", CLAIMED_MEMORY, in_memory),
        ("memory held for states, of their budget", POOL_BAR, pool),
    ):
        yield f"| {what} | {bar} | {'not measured' if measured is None else f'{measured:.2f}'} |"


def _trace(result: Result) -> Iterator[str]:
    found = []
    for case in result.cases:
        nested = {name: value for name, value in case.items() if isinstance(value, dict)}
        if not nested:
            found.append(dict(case))
        found += [{"case": case["case"], "step": name, **value} for name, value in nested.items()]
    yield from _table(found)
    yield ""
    yield "The traces open in chrome://tracing or ui.perfetto.dev."


_SECTIONS = {
    "matrix": _cases, "memory": _memory, "time": _time, "floor": _floor, "trace": _trace, "transfers": _transfers,
}  # fmt: skip
