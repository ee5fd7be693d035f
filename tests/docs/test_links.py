"""Links of the pages lead somewhere, by path and by heading. Those of other sites are not tried."""

from urllib.parse import unquote

from tests.docs.pages import PAGES, RESULTS, ROOT, anchors, links


def broken(page):
    found = []
    for address in links(page):
        path, _, anchor = unquote(address).partition("#")
        if "://" in address:
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.is_relative_to(ROOT) and not target.is_relative_to(page.parent):
            found.append(f"{address}: outside the repository")
        elif not target.is_file():
            found.append(f"{address}: no such file")
        elif anchor and anchor not in anchors(target):
            found.append(f"{address}: no such heading")
    return found


def test_every_link_leads_to_a_file_and_a_heading():
    found = {page.name: broken(page) for page in (*PAGES, *RESULTS)}
    assert {name: addresses for name, addresses in found.items() if addresses} == {}


def test_every_page_of_docs_can_be_reached_from_the_list_of_pages():
    listed = {(ROOT / "docs" / address).resolve() for address in links(ROOT / "docs/README.md")}
    assert {*(ROOT / "docs").glob("*.md")} - listed == {ROOT / "docs/README.md"}
