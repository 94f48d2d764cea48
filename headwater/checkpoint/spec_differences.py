"""Whether a training fits the checkpoint that it is to resume from."""

from __future__ import annotations

from collections.abc import Iterable

from headwater.checkpoint.manifest import Manifest
from headwater.messages import ModelSpec, RuleSpec, TableSpec, TensorSpec
from headwater.spec.layout import describe


def differences(
    manifest: Manifest, models: Iterable[ModelSpec], tables: Iterable[TableSpec]
) -> tuple[str, ...]:
    """What keeps declared models and tables from being those of a checkpoint, one text each.

    Scalars of rules (lr) may differ; tensors, dims, kinds of rules and what decides a row's life may not.
    """
    kept_models = {record.spec.name: record.spec for record in manifest.models}
    kept_tables = {record.spec.name: record.spec for record in manifest.tables}
    found: list[str] = []
    for model in models:
        if model.name in kept_models:
            found += _of_models(kept_models[model.name], model)
        else:
            found.append(_unknown("model", model.name, kept_models))
    for table in tables:
        if table.name in kept_tables:
            found += _of_tables(kept_tables[table.name], table)
        else:
            found.append(_unknown("table", table.name, kept_tables))
    return tuple(found)


def _unknown(kind: str, name: str, kept: Iterable[str]) -> str:
    return f"the checkpoint has no {kind} {name!r}, only {', '.join(map(repr, kept)) or 'none at all'}"


def _of_models(kept: ModelSpec, declared: ModelSpec) -> list[str]:
    found = []
    if set(kept.tensors) != set(declared.tensors):
        found.append(
            f"model {kept.name!r} has tensors ({_only(kept.tensors, declared.tensors)}) in the checkpoint, "
            f"({_only(declared.tensors, kept.tensors)}) here"
        )
    rules = [rule.name for rule in kept.rules], [rule.name for rule in declared.rules]
    if rules[0] != rules[1]:
        found.append(
            f"model {kept.name!r} has rules {', '.join(rules[0])} in the checkpoint, "
            f"{', '.join(rules[1])} here"
        )
    return found


def _only(tensors: tuple[TensorSpec, ...], others: tuple[TensorSpec, ...]) -> str:
    known = set(others)
    return describe([tensor for tensor in tensors if tensor not in known]) or "nothing more"


def _of_tables(kept: TableSpec, declared: TableSpec) -> list[str]:
    pairs: dict[str, tuple[object, object]] = {
        "dim": (kept.dim, declared.dim),
        "rule": (kept.rule.name, declared.rule.name),
        "initializer": (_shown(kept.initializer), _shown(declared.initializer)),
        "seed": (kept.seed, declared.seed),
        "admission": (_shown(kept.admission), _shown(declared.admission)),
        "expiry": (_shown(kept.expiry), _shown(declared.expiry)),
    }
    return [
        f"table {kept.name!r} has {what} {before} in the checkpoint, {now} here"
        for what, (before, now) in pairs.items()
        if before != now
    ]


def _shown(spec: RuleSpec | None) -> str:
    return "none" if spec is None else describe_rule(spec)


def describe_rule(spec: RuleSpec) -> str:
    """`SGD(lr=0.5, momentum=0.9)`."""
    settings = [
        f"{name}={describe_rule(value) if isinstance(value, RuleSpec) else value!r}"
        for name, value in spec.settings.items()
    ]
    return f"{spec.name}({', '.join(settings)})"
