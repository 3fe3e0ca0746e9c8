"""``leanops compare`` exits 1 exactly when a case is slower beyond its interval."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest

from leanops.bench import cli, compare
from leanops.bench.results import OperatorResults

SCHEMA = OperatorResults.SCHEMA


def roofline(**changes):
    return {"device": "cpu", "threads": 1, "bandwidth": {"copy": 10e9}, "gemm": {}, "dispatch_s": 1e-6} | changes


def results(times, noise=0.01, drift=0.0, cpu="a", bandwidth=10e9):
    rows = []
    for seed, (key, (status, seconds)) in enumerate(times.items()):
        spread = 1 + 0.005 * np.random.default_rng(seed).standard_normal(30)
        rows.append({"key": key, "status": status, "samples_s": list(seconds * spread) if status == "ok" else []})
    return {
        "schema": SCHEMA,
        "fingerprint": {"cpu": {"name": cpu}},
        "noise_floor": noise,
        "drift": drift,
        "roofline": [roofline(bandwidth={"copy": bandwidth})],
        "rows": rows,
    }


@pytest.fixture
def run(tmp_path):
    def compared(base, new):
        paths = []
        for name, content in (("base.json", base), ("new.json", new)):
            paths.append(str(tmp_path / name))
            (tmp_path / name).write_text(json.dumps(content))
        out = io.StringIO()
        return compare.main(*paths, out), out.getvalue()

    return compared


@pytest.mark.parametrize(
    ("factor", "noise", "drift", "status", "verdict"),
    [
        (1.0, 0.01, 0.0, 0, "same"),
        (1.2, 0.01, 0.0, 1, "slower"),
        (1.2, 0.30, 0.0, 0, "same"),  # within the runs' own noise
        (1.2, 0.01, 0.4, 0, "same"),  # the machine itself drifted more
        (0.8, 0.01, 0.0, 0, "faster"),
    ],
)
def test_exit_status_follows_the_interval(run, factor, noise, drift, status, verdict):
    base = results({"x": ("ok", 1e-3), "y": ("ok", 1e-3)}, noise, drift)
    code, text = run(base, results({"x": ("ok", 1e-3), "y": ("ok", factor * 1e-3)}, noise, drift))
    assert code == status
    assert any(line.split()[:2] == ["y", verdict] for line in text.splitlines())
    assert any(line.split()[:2] == ["x", "same"] for line in text.splitlines())


def test_cases_of_one_file_only_and_wrong_ones_are_said_and_are_not_slower(run):
    base = results({"gone": ("ok", 1e-3), "broken": ("ok", 1e-3), "skipped": ("skipped", 0)})
    code, text = run(base, results({"added": ("ok", 9.0), "broken": ("wrong", 0), "skipped": ("skipped", 0)}))
    words = {line.split()[0]: line.split()[1] for line in text.splitlines() if "," not in line}
    assert code == 0
    assert (words["gone"], words["added"], words["broken"], words["skipped"]) == ("missing", "new", "wrong", "skipped")


def test_fingerprints_that_differ_are_said(run):
    base, new = results({"x": ("ok", 1.0)}), results({"x": ("ok", 1.0)}, cpu="b", bandwidth=5e9)
    _, text = run(base, new)
    assert "fingerprint differs: cpu.name: a -> b" in text
    assert "new over base: 0.500" in text
    assert "fingerprint" not in run(base, base)[1]


def test_a_file_that_is_no_result_is_one_line_and_status_2(tmp_path, capsys):
    good, bad, other = tmp_path / "good.json", tmp_path / "bad.json", tmp_path / "other.json"
    good.write_text(json.dumps(results({})))
    bad.write_text("{")
    other.write_text('{"schema": "something/9"}')
    for path, message in ((bad, "is not JSON"), (other, "got something/9"), (tmp_path / "none", "No such file")):
        assert cli.main(["compare", str(good), str(path)]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert message in captured.err
        assert captured.err.count("\n") == 1


def with_(**changes):
    return results({"x": ("ok", 1e-3)}) | changes


def without(name):
    return {key: value for key, value in with_().items() if key != name}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe\x00", "is not JSON"),  # not UTF-8
        (without("fingerprint"), "fingerprint must be an object, got null"),
        (without("roofline"), "roofline must be a list, got null"),
        (with_(rows=None), "rows must be a list, got null"),
        (with_(rows=[1]), "rows[0] must be an object, got 1"),
        (with_(rows=[{"status": "ok"}]), "rows[0].key must be a string, got null"),
        (with_(rows=[{"key": "x", "status": True}]), "rows[0].status must be a string, got true"),
        (with_(rows=[{"key": "x", "status": "ok"}]), "rows[0].samples_s must be a list of positive times, got []"),
        (with_(rows=[{"key": "x", "status": "ok", "samples_s": None}]), "rows[0].samples_s must be a list, got null"),
        (with_(rows=[{"key": "x", "status": "ok", "samples_s": ["a"]}]), 'samples_s[0] must be a number, got "a"'),
        (with_(rows=[{"key": "x", "status": "ok", "samples_s": [1.0, 0]}]), "positive times, got [1.0, 0]"),
        (with_(rows=[{"key": "x", "status": "ok", "samples_s": [float("nan")]}]), "positive times, got [NaN]"),
        (with_(roofline=[{"device": "cpu", "threads": 1}]), "roofline[0].bandwidth must be an object, got null"),
        (with_(roofline=[roofline(threads=None)]), "roofline[0].threads must be a whole number, got null"),
        (with_(roofline=[roofline(bandwidth={"copy": 0})]), "roofline[0].bandwidth.copy must be a positive"),
        (with_(roofline=[roofline(gemm={"float32": -1.0})]), "roofline[0].gemm.float32 must be a positive number"),
        (with_(drift="x"), 'drift must be a number, got "x"'),
        (with_(noise_floor=-1), "noise_floor must be a number, 0 or more, or null, got -1"),
    ],
)
@pytest.mark.parametrize("damaged", ["base", "new"])
def test_a_damaged_file_is_named_with_its_entry_before_anything_is_printed(content, message, damaged, tmp_path, capsys):
    paths = {name: tmp_path / f"{name}.json" for name in ("base", "new")}
    for name, path in paths.items():
        written = content if name == damaged else with_(fingerprint={"cpu": {"name": "b"}})
        path.write_bytes(written if isinstance(written, bytes) else json.dumps(written).encode())
    assert cli.main(["compare", *map(str, paths.values())]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.count("\n") == 1
    assert f"{damaged}.json" in error
    assert message in error


def test_the_published_results_can_be_compared():
    published = sorted((Path(__file__).parents[2] / "docs" / "results" / "cpu").glob("*.json"))
    taken = [path for path in published if json.loads(path.read_text()).get("schema") == SCHEMA]
    assert taken
    for path in taken:
        assert compare.main(str(path), str(path), io.StringIO()) == 0


def spread(times, width):
    """Results whose samples scatter by a factor of ``width`` both ways."""
    found = results({"x": ("ok", 1.0)}, noise=0.0)
    found["rows"][0]["samples_s"] = [times * width ** (i / 10) for i in range(-10, 11)]
    return found


@pytest.mark.parametrize(("width", "blind"), [(1.02, False), (2.0, True)])
def test_an_interval_too_wide_to_see_a_tenth_says_so(run, width, blind):
    code, text = run(spread(1.0, width), spread(1.0, width))
    assert code == 0
    row = next(line for line in text.splitlines() if line.startswith("x "))
    assert row.split()[1] == "same"
    assert ("too wide to see a tenth" in row) is blind
    assert ("1 of those called the same" in text) is blind


def test_a_change_that_is_seen_is_not_called_too_wide(run):
    code, text = run(spread(1.0, 1.5), spread(9.0, 1.5))
    assert code == 1
    assert "too wide" not in text
