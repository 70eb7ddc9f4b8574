from __future__ import annotations

from alibi_attention import __main__, backends


def test_the_table_names_every_back_end_and_its_errors(capsys):
    __main__.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("name ")] == [backend.name for backend in backends()]
    errors = [line for line in lines if line.startswith("error ")]
    assert len(errors) == sum(len(backend.dtypes) for backend in backends())
    assert all("output" in line and "dv" in line for line in errors)
