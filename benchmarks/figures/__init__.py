"""The figures that this project promises, each measured against its limit: `python -m benchmarks.figures`."""

from dataclasses import dataclass

from benchmarks.measure import spread


@dataclass(frozen=True)
class Figure:
    name: str
    relation: str  # "<=" or ">="
    limit: float
    values: list[float]  # one for each round; empty where the figure does not apply, or could not be measured
    unit: str = "x"
    note: str = ""
    failed: bool = False  # whether it applies and could not be measured; `note` says why

    def as_dict(self) -> dict:
        entry = {"figure": self.name, "needed": f"{self.relation} {self.limit:g} {self.unit}", "note": self.note}
        if not self.values:
            return entry | {"met": False if self.failed else None}
        measured = spread(self.values)
        met = measured["median"] <= self.limit if self.relation == "<=" else measured["median"] >= self.limit
        return entry | {"unit": self.unit, "rounds": len(self.values), **measured, "met": met}
