import json
import os
import subprocess
import sys

import pytest

import pyfastpeft
from pyfastpeft import cli
from pyfastpeft.ops import dispatch, native, reference, schemas


def doctor(capsys, *options):
    code = cli.main(["doctor", *options])
    return code, capsys.readouterr().out


def break_backend(monkeypatch, backend, function):
    rows = [
        row._replace(function=function) if row.backend == backend else row for row in dispatch.TABLE["lora_forward"]
    ]
    monkeypatch.setitem(dispatch.TABLE, "lora_forward", rows)


def wrong(x, weight, bias, lora_A, lora_B, scaling, *rest):
    reference.lora_forward(x, weight, bias, lora_A, lora_B, 1.001 * scaling, *rest)


def test_doctor_tells_of_every_backend(capsys):
    code, out = doctor(capsys, "--json")
    findings = json.loads(out)
    assert code == 0
    backends = {row["backend"]: row for row in findings["backends"]}
    assert tuple(backends) == dispatch.BACKENDS
    assert sorted(schemas.SCHEMAS) == backends["reference"]["ops"]
    assert backends["cpu"]["available"] == native.AVAILABLE
    assert all(row["available"] or row["why_not"] for row in backends.values())
    checked = {row["backend"]: row for row in findings["checks"]}
    assert checked.keys() == {name for name, row in backends.items() if row["available"]}
    assert all(row["ok"] and 0 < row["error"] < 1e-6 for row in checked.values())


def test_doctor_prints_aligned_tables(capsys, monkeypatch):
    monkeypatch.setenv("PYFASTPEFT_CHECK", "1")
    _, out = doctor(capsys)
    lines = out.splitlines()
    assert pyfastpeft.__version__ in lines[0]
    assert [line.split() for line in lines if line.startswith("PYFASTPEFT_CHECK")] == [["PYFASTPEFT_CHECK", "1"]]
    header = next(line for line in lines if line.startswith("backend") and "dtypes" in line)
    rows = lines[lines.index(header) + 1 :][: len(dispatch.BACKENDS)]
    assert [row.split()[0] for row in rows] == list(dispatch.BACKENDS)
    at = header.index("available")
    assert {row[at:].split()[0] for row in rows} <= {"yes", "no"}


def test_doctor_notices_a_wrong_result(capsys, monkeypatch):
    break_backend(monkeypatch, "reference", wrong)
    code, out = doctor(capsys)
    assert code == 1
    assert "WRONG" in out


def test_doctor_notices_a_backend_that_raises(capsys, monkeypatch):
    def broken(*arguments):
        raise OSError("no such device")

    break_backend(monkeypatch, "reference", broken)
    code, out = doctor(capsys, "--json")
    assert code == 1
    failed = [row for row in json.loads(out)["checks"] if row["backend"] == "reference"]
    assert [row["failure"] for row in failed] == ["OSError: no such device"] * len(failed)
    assert failed


def test_without_a_command_it_prints_help(capsys):
    assert cli.main([]) == 0
    assert "doctor" in capsys.readouterr().out


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["surgeon"])
    assert stop.value.code == 2
    assert "surgeon" in capsys.readouterr().err


def test_module_runs_the_command_line():
    done = subprocess.run(
        [sys.executable, "-m", "pyfastpeft", "doctor", "--json"],
        env=os.environ | {"PYFASTPEFT_BACKEND": "reference"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["environment"]["PYFASTPEFT_BACKEND"] == "reference"
