"""What `elmwood fit --table` prints."""

from pathlib import Path

from typer.testing import CliRunner

from elmwood.cli import app


def test_the_table_of_the_docs_is_what_the_command_prints():
    printed = CliRunner().invoke(app, ["fit", "--table"]).stdout
    assert len(printed.splitlines()) == 7
    assert printed in (Path(__file__).parents[2] / "docs" / "training.md").read_text()
