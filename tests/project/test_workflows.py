"""What stands in .github can be read, calls targets that exist, and has no rights to spare."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = {path.name: path for path in (ROOT / ".github" / "workflows").glob("*.yml")}
TARGETS = set(re.findall(r"^([a-z-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))


def steps_of(name):
    jobs = yaml.safe_load(WORKFLOWS[name].read_text())["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


def test_all_are_there():
    assert set(WORKFLOWS) == {"ci.yml", "docs.yml", "release.yml"}


RIGHTS = {
    "release.yml": {"publish": {"id-token": "write"}},
    "docs.yml": {"deploy": {"contents": "write", "pages": "write", "id-token": "write"}},
}


@pytest.mark.parametrize("name", sorted(WORKFLOWS))
def test_workflows_call_make_alone_and_targets_that_exist(name):
    runs = [step["run"] for step in steps_of(name) if "run" in step and "name" not in step]
    assert runs
    for run in runs:
        make, *targets = run.split()
        assert make == "make"
        assert set(targets) <= TARGETS


def test_the_pull_request_workflows_check_what_ci_run_checks():
    lines = re.findall(r"^make (.*)", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    wanted = {word for line in lines for word in line.split()} & TARGETS
    steps = steps_of("ci.yml") + steps_of("docs.yml")
    found = {word for step in steps for word in step.get("run", "").split()}
    assert {"lint", "typecheck", "docs", "test"} <= wanted <= found


@pytest.mark.parametrize("name", sorted(WORKFLOWS))
def test_rights_are_given_where_they_are_needed(name):
    workflow = yaml.safe_load(WORKFLOWS[name].read_text())
    assert workflow["permissions"] == {"contents": "read"}
    rights = {
        key: job["permissions"] for key, job in workflow["jobs"].items() if "permissions" in job
    }
    assert rights == RIGHTS.get(name, {})
    assert all("timeout-minutes" in job for job in workflow["jobs"].values())


@pytest.mark.parametrize("name", sorted(WORKFLOWS))
def test_actions_have_versions(name):
    for step in steps_of(name):
        if "uses" in step:
            assert re.search(r"@(v\d+|release/v\d+|[0-9a-f]{40})$", step["uses"])


def test_every_promised_python_is_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    promised = re.findall(r"Python :: (3\.\d+)", "\n".join(project["classifiers"]))
    matrix = yaml.safe_load(WORKFLOWS["ci.yml"].read_text())["jobs"]["test"]["strategy"]["matrix"]
    assert matrix["python-version"] == promised


@pytest.mark.parametrize("form", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml")))
def test_issue_forms_ask_for_something(form):
    fields = yaml.safe_load(form.read_text())["body"]
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["attributes"]["label"] for field in fields)
    if form.stem == "bug_report":
        assert "python -m negcache_core" in form.read_text()


@pytest.mark.parametrize("name", ["dependabot.yml", "ISSUE_TEMPLATE/config.yml"])
def test_settings_can_be_read(name):
    assert isinstance(yaml.safe_load((ROOT / ".github" / name).read_text()), dict)
