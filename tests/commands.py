"""The command line as tests call it."""

from __future__ import annotations

from typer.testing import CliRunner

from hgc.cli.app import app

runner = CliRunner()


def run(*arguments, code=0) -> str:
    result = runner.invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def refused(*arguments) -> str:
    """What a wrong use is answered with: one line, exit code 2."""
    output = run(*arguments, code=2).strip()
    assert output.startswith("hgc: ") and "\n" not in output and "Traceback" not in output
    return output
