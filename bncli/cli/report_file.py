"""The file of a report: written whole or not at all, and opened in a browser."""

from pathlib import Path
from typing import TYPE_CHECKING

from bncli.cli.messages import print_note
from bncli.errors import BncliError

if TYPE_CHECKING:
    from bncli.report import Content, DrawingLibrary

NAME = "report.html"


def save_report(content: "Content", library: "DrawingLibrary", path: Path) -> int:
    """Write the page; its size in bytes. Raises BncliError where it cannot be written."""
    from bncli.cli.result_file import result_file
    from bncli.report import render_page

    page = render_page(content, library).encode()
    with result_file(path, "the report") as file:
        file.write(page)
    return len(page)


def open_in_browser(path: Path) -> None:
    """Ask the desktop to show it; where there is none, say where it is."""
    import webbrowser

    if not webbrowser.open(path.resolve().as_uri()):
        print_note(f"no browser was found; open {path} in one")


def _start_library() -> "DrawingLibrary":
    from bncli.report import DrawingLibrary

    return DrawingLibrary()


class RunReport:
    """The page of a run that is going on, at any moment a whole one; nothing where it is not wanted.

    A page that cannot be written does not end the run: it is said once.
    """

    def __init__(self, run_dir: Path, *, wanted: bool, opens: bool) -> None:
        """Raises BncliError where what draws it is missing."""
        self._path = run_dir / NAME
        self._opens = opens
        self._failure = ""
        self._library = _start_library() if wanted else None

    def update(self, event: object) -> None:
        """After an epoch, write it anew from what the run has saved; the first time, open it if asked to."""
        from bncli.training import EpochDone

        if isinstance(event, EpochDone):
            self._write()

    def finish(self, *, silent: bool) -> None:
        """Write it with all that the run left, and unless `silent` say where it is."""
        if self._library is not None and self._write() and not silent:
            print(f"report         {self._path}")

    def _write(self) -> bool:
        from bncli.report import read_content

        if self._library is None:
            return False
        try:
            save_report(read_content([str(self._path.parent)]), self._library, self._path)
        except BncliError as error:
            if str(error) != self._failure:
                self._failure = str(error)
                print_note(f"the report was not written: {error}")
            return False
        if self._opens:
            self._opens = False
            open_in_browser(self._path)
        return True
