"""A page as a reader's program sees it: its tables, anchors and addresses."""

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "img", "hr", "input"}
ADDRESSES = ("href", "src", "srcset", "action", "data", "poster", "xlink:href")


@dataclass
class HtmlTable:
    caption: str = ""
    rows: list[list[str]] = field(default_factory=list)


class HtmlPage(HTMLParser):
    """Parsed; an element that is not closed in its order is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[HtmlTable] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[tuple[str, str]] = []
        self.described: list[str] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.text_of: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        self.tags.append(tag)
        self.ids += [given["id"]] if "id" in given else []
        self.addresses += [(tag, given[key]) for key in ADDRESSES if key in given]
        self.described += given.get("aria-labelledby", "").split()
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append(HtmlTable())
        elif tag == "tr":
            self.tables[-1].rows.append([])
        elif tag in ("td", "th"):
            self.tables[-1].rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.words.append(data)
        if "caption" in self.open:
            self.tables[-1].caption += data
        if self.open and ("td" in self.open or "th" in self.open):
            self.tables[-1].rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def table(self, caption: str) -> list[list[str]]:
        """The rows of the one table with a caption that begins so."""
        (found,) = [table.rows for table in self.tables if table.caption.startswith(caption)]
        return found
