"""The sites of all versions stand side by side, and are listed in order."""

import json
import runpy
from pathlib import Path

import pytest

NAMES = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "publish.py"))
publish = NAMES["publish"]


@pytest.fixture
def built(tmp_path):
    folder = tmp_path / "built"
    folder.mkdir()
    (folder / "index.html").write_text("a page")
    return folder


def listed(site):
    return json.loads((site / "versions.js").read_text().partition("=")[2].strip("; \n"))


def test_releases_come_first_by_number_and_index_leads_to_the_newest(built, tmp_path):
    site = tmp_path / "site"
    publish(built, site, "dev")
    assert listed(site) == ["dev"]
    assert 'url=dev/index.html"' in (site / "index.html").read_text()
    for version in ("v0.9.0", "v0.10.0", "v0.2.0"):
        publish(built, site, version)
    (site / "notes").mkdir()
    (site / "notes" / "index.html").touch()  # no version
    publish(built, site, "dev")
    assert listed(site) == ["v0.10.0", "v0.9.0", "v0.2.0", "dev"]
    assert 'url=v0.10.0/index.html"' in (site / "index.html").read_text()


def test_a_version_that_is_published_again_replaces_its_folder(built, tmp_path):
    site = tmp_path / "site"
    publish(built, site, "v0.1.0")
    (site / "v0.1.0" / "gone.html").touch()
    publish(built, site, "v0.1.0")
    assert [path.name for path in (site / "v0.1.0").iterdir()] == ["index.html"]


@pytest.mark.parametrize("version", ["0.1.0", "v1", "../up", ""])
def test_what_is_no_version_is_refused(built, tmp_path, version):
    with pytest.raises(SystemExit, match=r"tag such as 'v1\.2\.3'"):
        publish(built, tmp_path / "site", version)
    assert not (tmp_path / "site").exists()


def test_what_was_not_built_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="make docs"):
        publish(tmp_path, tmp_path / "site", "dev")
