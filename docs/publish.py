"""Put a built site among those of other versions, each of which has a folder of its own.

    python docs/publish.py docs/_build/html site dev
    python docs/publish.py docs/_build/html site v0.1.0

Beside the folders stand versions.js, from which every page of every version has its list of
versions, and index.html, which leads to the newest release.
"""

import argparse
import json
import re
import shutil
from pathlib import Path

RELEASE = re.compile(r"v(\d+)\.(\d+)\.(\d+)")
MAIN = "dev"
LEAD = """<!DOCTYPE html>
<meta charset="utf-8">
<title>negcache</title>
<meta http-equiv="refresh" content="0; url={0}/index.html">
<a href="{0}/index.html">negcache {0}</a>
"""


def publish(built: Path, site: Path, version: str) -> None:
    """Copy a built site into a folder of `site`, in place of what was there; list all versions."""
    if not (built / "index.html").exists():
        raise SystemExit(f"{built} is no built site: run make docs first.")
    if version != MAIN and not RELEASE.fullmatch(version):
        raise SystemExit(f"a version is {MAIN!r} or a tag such as 'v1.2.3', not {version!r}.")
    shutil.rmtree(site / version, ignore_errors=True)
    shutil.copytree(built, site / version)
    versions = versions_of(site)
    (site / "versions.js").write_text(f"window.negcacheVersions = {json.dumps(versions)};\n")
    (site / "index.html").write_text(LEAD.format(versions[0]))


def versions_of(site: Path) -> list[str]:
    """Return the folders of versions: releases first, the newest before others, then main."""
    names = [path.parent.name for path in site.glob("*/index.html")]
    releases = [name for name in names if RELEASE.fullmatch(name)]
    releases.sort(key=lambda name: [int(part) for part in RELEASE.fullmatch(name).groups()])
    return [*reversed(releases), *(name for name in names if name == MAIN)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("built", type=Path, help="folder of the built site")
    parser.add_argument("site", type=Path, help="folder of all versions")
    parser.add_argument("version", help=f"{MAIN}, or a tag")
    publish(**vars(parser.parse_args()))
