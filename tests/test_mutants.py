"""The faults that `tests/mutants.py` puts into the code: of every kind, in every area, each one change that compiles."""

import ast

import mutants
import pytest
from faults import changed, compiles, faults_of

SOURCE = """\
def clamp(values, least, *, most=3, strict=False):
    if strict and not values:
        return None
    kept = []
    for value in values:
        if least <= value < most:
            continue
        kept.append(min(value + 1, least))
        total = least * 2
    return sorted(kept, key=abs, reverse=True)
"""
CHANGES = {
    ("and", "or"),
    ("not values", "values"),
    ("<=", "<"),
    ("<", "<="),
    ("continue", "pass"),
    ("kept.append(min(value + 1, least))", "pass"),
    ("min", "max"),
    ("+", "-"),
    ("1", "2"),
    ("*", "+"),
    ("2", "3"),
    ("3", "4"),
    ("False", "True"),
    ("True", "False"),
    ("key=abs,", ""),
    ("reverse=True", ""),
    ("sorted(kept, key=abs, reverse=True)", "None"),
    ("strict and not values", "(not (strict and not values))"),
}


def found_in(source):
    return faults_of("some", "some.py", source.encode())


def test_every_kind_of_fault_is_found_once():
    found = found_in(SOURCE)
    assert {(fault.old, fault.new) for fault in found} == CHANGES and len(found) == len(CHANGES)
    assert len({fault.number for fault in found}) == len(found)


def test_a_fault_is_one_change_that_compiles():
    source = SOURCE.encode()
    whole = ast.dump(ast.parse(source))
    for fault in found_in(SOURCE):
        assert compiles(fault, source)
        after = changed(fault, source)
        assert ast.dump(ast.parse(after)) != whole
        assert after[: fault.span[0]] == source[: fault.span[0]]
        assert fault.old.splitlines()[0] in SOURCE.splitlines()[fault.line - 1]
    (fault,) = [fault for fault in found_in(SOURCE) if fault.old == "and"]
    with pytest.raises(ValueError, match=r"some\.py:2 is no longer"):
        changed(fault, source.replace(b"strict and", b"strict or"))


def test_numbers_stay_when_something_else_changes():
    before = {fault.number for fault in found_in(SOURCE)}
    more = "import math\n\n\ndef other():\n    return 1 + math.pi\n\n\n"
    assert before < {fault.number for fault in found_in(more + SOURCE)}


def test_every_area_has_its_faults_and_tests():
    numbers = []
    for area, spec in mutants.AREAS.items():
        chosen = mutants.chosen(area)
        assert len(chosen) == spec.count, area
        numbers += [fault.number for fault in chosen]
        assert len(set(spec.tests)) == len(spec.tests)
        for test in spec.tests:
            assert (mutants.ROOT / test.partition("::")[0]).is_file(), test
    assert len(set(numbers)) == len(numbers) >= 150
    there = {
        fault.number
        for area in mutants.AREAS
        for file, source in mutants.sources_of(area).items()
        for fault in faults_of(area, file, source)
    }
    assert mutants.REASONS.keys() <= there, "reasons for faults of code that is no longer there"


def test_shares_leave_out_what_is_no_fault(tmp_path, capsys, monkeypatch):
    lines = [
        '{"number": "a", "area": "layout", "result": "caught", "where": "x", "change": "y"}',
        '{"number": "b", "area": "layout", "result": "survived", "where": "x", "change": "y"}',
        '{"number": "c", "area": "layout", "result": "survived", "where": "x", "change": "y"}',
    ]
    (tmp_path / "results.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(mutants, "REASONS", {"c": "speed alone"})
    assert mutants.report(tmp_path / "results.jsonl") == ["layout"]
    printed = capsys.readouterr().out
    assert "1 of   2  0.50" in printed and "survived b" in printed and "survived c" not in printed
