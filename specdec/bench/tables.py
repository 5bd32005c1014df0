"""``bench.json`` as tables: Markdown for the write-up, the same cells for the page. Computes no figure of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from specdec.bench.profiling import FORWARD, PARTS
from specdec.bench.records import NOT_MEASURED
from specdec.bench.texts import ALL, CALM

_NONE = "–"


@dataclass(frozen=True)
class Table:
    """A titled table: ``rows`` are cells as shown, ``note`` says what they stand for."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def tables(content: Mapping[str, Any]) -> dict[str, list[Table]]:
    """The tables of every section that was measured."""
    makers: dict[str, Callable[[Mapping[str, Any]], list[Table]]] = {
        "step": _step,
        "end_to_end": _end_to_end,
        "growth": _growth,
        "memory": _memory,
        "profile": _profile,
        "gpu": _gpu,
    }
    return {name: makers[name](section) for name, section in content["sections"].items()}


def markdown(content: Mapping[str, Any]) -> str:
    """All tables, with where they come from."""
    parts = [f"Measured by `{content['provenance']['command']}`: {conditions(content)}."]
    for found in tables(content).values():
        for table in found:
            lines = [table.head, ["---", *["---:"] * (len(table.head) - 1)], *table.rows]
            body = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
            parts += [f"### {table.title}", body, *([table.note] if table.note else [])]
    return "\n\n".join(parts) + "\n"


def conditions(content: Mapping[str, Any]) -> str:
    """Machine, threads, versions and code, in one line."""
    said = content["provenance"]
    versions = said["versions"]
    git = said["git"]
    code = "no checkout" if git is None else git["sha"][:9] + (" with local changes" if git["dirty"] else "")
    return (
        f"{said['device']}, {said['threads']} threads, torch {versions['torch']}, transformers "
        f"{versions['transformers']}, code {code}, {said['started'][:10]}"
    )


def _step(section: Mapping[str, Any]) -> list[Table]:
    head = ["model", "nodes", "raw forward, ms", "our step, ms", "step / raw", "compiled, ms", "step / compiled",
            "byte limit, ms", "best / limit"]  # fmt: skip
    rows = []
    for row in section["rows"]:
        compiled = _median(row["compiled_ms"]) if "compiled_ms" in row else row.get("compiled_failure", NOT_MEASURED)
        ratio = _times(row["speedup"]) if "speedup" in row else _NONE
        cells = [row["model"], str(row["nodes"]), _median(row["raw_ms"]), _median(row["step_ms"])]
        cells += [f"{1 + row['overhead']:.3f}", compiled, ratio]
        rows.append([*cells, f"{row['limit_ms']:.2f}", _times(row["over_limit"])])
    context = section["rows"][0]["context"] if section["rows"] else 0
    note = (
        f"Batch 1, {context} tokens of context; medians of laps taken in turns. Raw forward: transformers' own over as "
        "many tokens behind as many, causal, with its DynamicCache and in inference mode. Our step: propose, inputs "
        "and masks, forward, acceptance, commit, moving the accepted path's K/V. Byte limit: weights and K/V once, at "
        "the bandwidth below."
    )
    return [Table("Step", head, rows, note), _subjects(section["subjects"])]


def _subjects(subjects: Sequence[Mapping[str, Any]]) -> Table:
    head = ["model", "parameters", "weights read", "K/V per token", "read bandwidth", "by"]
    rows = []
    for subject in subjects:
        reader, best = max(subject["bytes_per_second"].items(), key=lambda item: item[1])
        cells = [f"{subject['model']} ({subject['dtype']})", f"{subject['parameters'] / 1e6:.1f} M"]
        cells += [_bytes(subject["weight_bytes"]), _bytes(subject["kv_bytes_per_token"])]
        rows.append([*cells, f"{best / 1e9:.1f} GB/s", reader])
    note = "Bandwidth: over a buffer as large as the weights, so a small model's is that of the caches."
    return Table("What a pass reads", head, rows, note)


def _end_to_end(section: Mapping[str, Any]) -> list[Table]:
    found = []
    for batch in dict.fromkeys(row["batch_size"] for row in section["rows"]):
        rows = [row for row in section["rows"] if row["batch_size"] == batch]
        pairs = [(row, _twin(rows, row)) for row in rows if row["subset"] == ALL]
        pairs.sort(key=lambda pair: -(pair[1] or pair[0])["tokens_per_second"])
        head = ["method", "accepted tokens", "tokens/s", "vs generate", "vs prompt lookup", "drafting",
                "identical, near-ties, bugs"]  # fmt: skip
        body = [_text_cells(row, calm) for row, calm in pairs]
        left_out = "".join(f" `{name}` was left out: {why}." for name, why in section["left_out"].items())
        found.append(Table(f"End to end, batch size {batch}", head, body, _text_note(pairs) + left_out))
    return found


def _twin(rows: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The same method over the texts that do not loop."""
    same = ("method", "kind", "state")
    calm = (other for other in rows if other["subset"] == CALM)
    return next((other for other in calm if all(other[key] == row[key] for key in same)), None)


def _text_cells(row: Mapping[str, Any], calm: Mapping[str, Any] | None) -> list[str]:
    name = row["method"] if row["state"] in ("all", "") else f"{row['method']}, {row['state']}"

    def two(key: str, digits: int) -> str:
        if row[key] is None:
            return _NONE
        first = _NONE if calm is None or calm[key] is None else f"{calm[key]:.{digits}f}"
        return f"{first} ({row[key]:.{digits}f})"

    verdicts = ", ".join(str(row[key]) for key in ("identical", "near_ties", "bugs")) if "bugs" in row else _NONE
    share = _NONE if row["draft_share"] is None else f"{100 * row['draft_share']:.0f} %"
    numbers = [two("mean_accepted_tokens", 2), two("tokens_per_second", 0), two("vs_generate", 2)]
    return [f"`{name}`", *numbers, two("vs_prompt_lookup", 2), share, verdicts]


def _text_note(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any] | None]]) -> str:
    row = pairs[0][0]
    note = (
        f"Outside the brackets: texts that do not end in a loop; in brackets: all {row['texts']} texts "
        f"({100 * (row['looping_share'] or 0):.0f} % end in one). Each ratio is against the faster dtype of the "
        f"baseline, over all texts `{row['generate_method']}` with {row['generate_tokens_per_second']:.0f} tokens/s"
    )
    if row["prompt_lookup_method"] is None:
        return f"{note}; transformers' prompt lookup takes one row at a time."
    return f"{note} and `{row['prompt_lookup_method']}` with {row['prompt_lookup_tokens_per_second']:.0f}."


def _growth(section: Mapping[str, Any]) -> list[Table]:
    head = ["batch", "context", "nodes", "raw forward, ms", "our step, ms", "step / raw", "byte limit, ms"]
    rows = [
        [str(row["rows"]), str(row["context"]), str(row["nodes"]), _median(row["raw_ms"]), _median(row["step_ms"]),
         f"{1 + row['overhead']:.3f}", f"{row['limit_ms']:.2f}"]
        for row in section["rows"]
    ]  # fmt: skip
    names = ", ".join(subject["model"] for subject in section["subjects"])
    read = ", ".join(f"{max(subject['bytes_per_second'].values()) / 1e9:.1f} GB/s" for subject in section["subjects"])
    note = f"As in the first table; one of the three grows. Read bandwidth when this was measured: {read}."
    return [Table(f"How a step grows ({names})", head, rows, note)]


def _memory(section: Mapping[str, Any]) -> list[Table]:
    head = ["drafter", "held beside the target", "K/V slabs", "peak, prefill", "peak, steps", "Python and numpy, steps"]
    rows = []
    for row in sorted(section["rows"], key=lambda row: row["step_bytes"]):
        python = _NONE if row["python_bytes"] is None else _bytes(row["python_bytes"])
        sizes = [_bytes(row[key]) for key in ("held_bytes", "kv_bytes", "prefill_bytes", "step_bytes")]
        rows.append([f"`{row['drafter']}`", *sizes, python])
    note = (
        f"{section['model']} ({_bytes(section['weight_bytes'])} of weights), one row, a prompt of "
        f"{section['prompt_tokens']} tokens. Peaks are beyond weights, what the drafter holds, and K/V; "
        f"by {section['how']}."
    )
    left_out = "; ".join(f"`{name}`: {reason}" for name, reason in section["left_out"].items())
    return [Table("Memory", head, rows, note + (f" Left out: {left_out}." if left_out else ""))]


def _profile(section: Mapping[str, Any]) -> list[Table]:
    models = dict.fromkeys(row["model"] for row in section["rows"])
    return [_profile_of(model, [row for row in section["rows"] if row["model"] == model]) for model in models]


def _profile_of(model: str, columns: Sequence[Mapping[str, Any]]) -> Table:
    names = [f"{row['nodes']} nodes x {row['rows']}{', compiled' * row.get('compiled', False)}" for row in columns]
    used = [part for part in PARTS if any(part in row["parts_ms"] for row in columns)]

    def cell(row: Mapping[str, Any], milliseconds: float) -> str:
        return f"{milliseconds:.3f} ms, {100 * milliseconds / row['step_ms']:.1f} %"

    rows = []
    for part in used:
        name = f"{part} (forward)" if part in FORWARD else part
        rows.append([name, *(cell(row, row["parts_ms"].get(part, 0.0)) for row in columns)])
    rows.append(["all outside the forward", *(cell(row, row["step_ms"] - row["forward_ms"]) for row in columns)])
    rows.append(["step", *(f"{row['step_ms']:.3f} ms" for row in columns)])
    note = "Each part without those inside it; means of the quicker half."
    return Table(f"Who takes what in one step ({model})", ["part", *names], rows, note)


def _gpu(section: Mapping[str, Any]) -> list[Table]:
    rows, known = [], ("context", "nodes", "read_bytes")
    names = [name for name in (section["rows"][0] if section["rows"] else {}) if name not in known]
    for row in section["rows"]:
        rows.append([str(row["context"]), str(row["nodes"]), *(_gpu_cell(row[name]) for name in names)])
    titles = {"raw_ms": "eager transformers, ms", "limit_ms": "byte limit, ms"}
    head = ["context", "nodes", *(titles.get(name, f"{name}, ms") for name in names)]
    found = [Table("GPU: a step of a Llama of 8 B parameters", head, rows)]
    attention = section["attention"]
    if isinstance(attention, str):
        return [*found, Table("GPU: attention alone", ["figure", "value"], [["all", attention]])]
    cells = [[_plain(value) for value in row.values()] for row in attention]
    return [*found, Table("GPU: attention alone", list(attention[0]) if attention else ["figure"], cells)]


def _gpu_cell(value: Any) -> str:
    if isinstance(value, str):
        return value
    return _median(value) if isinstance(value, Mapping) else f"{value:.2f}"


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _median(times: Mapping[str, float]) -> str:
    return f"{times['median']:.2f} ({times['low']:.2f} to {times['high']:.2f})"


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x"


def _bytes(size: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size:.0f} B"
