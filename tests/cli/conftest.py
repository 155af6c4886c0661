"""What the tests of the command line share."""

import sys

import pytest

from elmwood import cli


@pytest.fixture
def run(capsys, monkeypatch):
    """Exit code and stderr of the command line. Anything but our own errors comes out as it is, and fails the test."""

    def main(*words):
        monkeypatch.setattr(sys, "argv", ["elmwood", *map(str, words)])
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        return code, capsys.readouterr().err

    return main
