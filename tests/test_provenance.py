import sys

from sparsedm_compile.provenance import provenance


def test_the_command_names_no_place_of_this_machine(monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["/opt/venv/bin/tool", "run", "--data", "/home/me/data", "--out=/srv/x/run", "a/b"]
    )
    assert provenance()["command"] == "tool run --data data --out=run a/b"
    monkeypatch.setattr(sys, "argv", ["-c", "--rule", "*.attn.*=2:4"])
    assert provenance()["command"] == "-c --rule '*.attn.*=2:4'"


def test_what_is_recorded():
    made = provenance()
    assert {"date", "cpu", "cores", "load", "gpus", "system", "python", "versions"} <= made.keys()
    assert made["versions"]["torch"]
