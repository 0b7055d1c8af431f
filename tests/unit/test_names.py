"""Resource names: what is one, what is not, and that none can climb out of a folder."""

from __future__ import annotations

from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollmesh import names
from rollmesh.errors import InvalidRequest

IDS = st.from_regex(names.ID_PATTERN, fullmatch=True)
BAD_IDS = [
    pytest.param("", id="empty"),
    pytest.param("A", id="upper case"),
    pytest.param("1a", id="starts with a digit"),
    pytest.param("-a", id="starts with a hyphen"),
    pytest.param("a-", id="ends with a hyphen"),
    pytest.param("a" * 64, id="64 characters"),
    pytest.param("a/b", id="slash"),
    pytest.param("..", id="dots"),
    pytest.param("a.b", id="dot"),
    pytest.param("a_b", id="underscore"),
    pytest.param("a b", id="space"),
    pytest.param("a\n", id="newline at the end"),
    pytest.param("a\0", id="NUL"),
    pytest.param("é", id="letter outside a-z"),
    pytest.param("٣a", id="digit outside 0-9"),
]


@pytest.mark.parametrize("value", ["a", "ab", "a1", "a-1", "a--b", "a" * 63])
def test_an_id_is_1_to_63_lower_case_letters_digits_and_hyphens(value):
    assert names.check_id(value, field="job_id") == value


@pytest.mark.parametrize("value", BAD_IDS)
def test_anything_else_is_refused_with_its_field_and_value(value):
    with pytest.raises(InvalidRequest, match="job_id") as caught:
        names.check_id(value, field="job_id")
    assert caught.value.context == {
        "field": "job_id",
        "value": value,
        "allowed": names.ID_PATTERN,
    }


@given(project=IDS, resource=IDS)
def test_names_are_parsed_into_what_they_were_made_of(project, resource):
    assert names.parse_project(names.project_name(project)) == project
    assert names.parse_adapter(names.adapter_name(project, resource)) == (project, resource)
    assert names.parse_job(names.job_name(project, resource)) == (project, resource)
    assert names.parse_key(names.key_name(project, resource)) == (project, resource)
    assert names.parse_lease(names.lease_name(project, resource)) == (project, resource)


@given(project=IDS, adapter=IDS, checkpoint=IDS)
def test_a_checkpoint_is_named_below_its_adapter(project, adapter, checkpoint):
    name = names.checkpoint_name(names.adapter_name(project, adapter), checkpoint)
    assert names.parse_checkpoint(name) == (project, adapter, checkpoint)
    for parse in (names.parse_project, names.parse_adapter, names.parse_job):
        with pytest.raises(InvalidRequest):
            parse(name)


@given(
    name=st.text()
    | st.from_regex(r"projects/[^/]*(/(jobs|adapters)/[^/]*(/checkpoints/[^/]*)?)?", fullmatch=True)
)
def test_whatever_is_accepted_is_a_plain_path_without_dots(name):
    for parse in (
        names.parse_project,
        names.parse_adapter,
        names.parse_job,
        names.parse_checkpoint,
    ):
        try:
            parse(name)
        except InvalidRequest:
            continue
        path = PurePosixPath(name)
        assert str(path) == name
        assert not path.is_absolute()
        assert not any("." in part for part in path.parts)


@pytest.mark.parametrize("value", BAD_IDS)
@pytest.mark.parametrize("form", ["projects/{}", "projects/{}/jobs/a", "projects/a/jobs/{}"])
def test_a_name_with_a_bad_id_is_refused(form, value):
    name = form.format(value)
    parse = names.parse_project if form == "projects/{}" else names.parse_job
    with pytest.raises(InvalidRequest) as caught:
        parse(name, field="name")
    assert caught.value.context["field"] == "name"
    assert caught.value.context["value"] == name


@pytest.mark.parametrize("value", BAD_IDS)
@pytest.mark.parametrize(
    "form",
    [
        "projects/{}/adapters/a/checkpoints/a",
        "projects/a/adapters/{}/checkpoints/a",
        "projects/a/adapters/a/checkpoints/{}",
    ],
)
def test_a_checkpoint_with_a_bad_id_is_refused(form, value):
    name = form.format(value)
    with pytest.raises(InvalidRequest) as caught:
        names.parse_checkpoint(name, field="checkpoint")
    assert caught.value.context["field"] == "checkpoint"
    assert caught.value.context["value"] == name


@pytest.mark.parametrize(
    "name",
    [
        "projects/a/adapters/b",
        "projects/a/adapters/b/checkpoints",
        "projects/a/adapters/b/checkpoints/c/d",
        "projects/a/adapters/b/checkpoints/c/checkpoints/d",
        "projects/a/adapters/b/checkpoints/c/",
        "projects/a/adapters/b/../checkpoints/c",
        "projects/a/adapters/../adapters/b/checkpoints/c",
        "/projects/a/adapters/b/checkpoints/c",
        "projects/a/jobs/b/checkpoints/c",
        "Projects/a/adapters/b/checkpoints/c",
        "projects/a/adapters/b/versions/c",
        "b/checkpoints/c",
        "/etc/passwd",
        "",
    ],
)
def test_a_name_of_another_form_is_no_checkpoint_and_the_form_is_told(name):
    form = r"projects/\{project\}/adapters/\{adapter\}/checkpoints/\{id\}"
    with pytest.raises(InvalidRequest, match=form) as caught:
        names.parse_checkpoint(name)
    assert caught.value.context["field"] == "name"


@pytest.mark.parametrize(
    "name",
    [
        "projects/a/adapters/b",
        "projects/a/jobs",
        "projects/a/jobs/b/c",
        "projects/a/jobs/b/",
        "/projects/a/jobs/b",
        "project/a/jobs/b",
        "a/jobs/b",
        "",
    ],
)
def test_a_name_of_another_form_is_no_job_and_the_form_is_told(name):
    with pytest.raises(InvalidRequest, match=r"projects/\{project\}/jobs/\{id\}"):
        names.parse_job(name)


def test_the_default_field_is_the_one_in_the_protos():
    with pytest.raises(InvalidRequest) as project:
        names.parse_project("x")
    with pytest.raises(InvalidRequest) as adapter:
        names.parse_adapter("x")
    assert project.value.context["field"] == "parent"
    assert adapter.value.context["field"] == "name"
