from pathlib import Path

import pytest

import ranks
import tiny


@pytest.fixture(scope="session")
def tiny_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 60 little pictures. Built in a child: ranks are forked from the parent, so it stays without threads."""
    folder = tmp_path_factory.mktemp("tiny")
    ranks.run(1, lambda rank, world: str(tiny.build_set(folder)))
    return folder / "set"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    passed = len(terminalreporter.stats.get("passed", []))
    terminalreporter.write_line(f"{passed} tests passed; {ranks.layouts_run} worlds of real ranks were started.")
