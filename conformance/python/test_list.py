"""`Sandbox.list`: filters, order, pages."""

import uuid

import pytest
from e2b import SandboxException, SandboxQuery, SandboxState


async def all_items(paginator):
    items = []
    while paginator.has_next:
        items += await paginator.next_items()
    return items


@pytest.fixture(scope="module")
async def five(Sandbox):
    """Five sandboxes, oldest first, and the metadata that picks them out."""
    mark = {"suite": uuid.uuid4().hex}
    sandboxes = []
    for number in range(5):
        metadata = {**mark, "parity": ["even", "odd"][number % 2], "odd name & more": "50% +é=/?#"}
        sandboxes.append(await Sandbox.create(timeout=600, metadata=metadata))
    yield mark, sandboxes
    for sandbox in sandboxes:
        await sandbox.kill()


def ids(items):
    return [item.sandbox_id for item in items]


async def test_list_tells_the_same_as_info(Sandbox, five):
    mark, sandboxes = five
    listed = {item.sandbox_id: item for item in await all_items(Sandbox.list(query=SandboxQuery(metadata=mark)))}
    info = await sandboxes[0].get_info()
    item = listed[info.sandbox_id]
    for field in ("template_id", "name", "metadata", "started_at", "state", "cpu_count", "memory_mb", "envd_version"):
        assert getattr(item, field) == getattr(info, field), field


async def test_without_filter_the_list_has_everything(Sandbox, five):
    listed = ids(await all_items(Sandbox.list()))
    assert set(ids(five[1])) <= set(listed)
    assert len(listed) == len(set(listed))


async def test_pages(Sandbox, five):
    mark, sandboxes = five
    paginator = Sandbox.list(query=SandboxQuery(metadata=mark), limit=2)
    pages = []
    while paginator.has_next:
        pages.append(ids(await paginator.next_items()))
    assert [len(page) for page in pages] == [2, 2, 1]
    # Newest first by default.
    assert sum(pages, []) == ids(reversed(sandboxes))
    with pytest.raises(Exception, match="No more items"):
        await paginator.next_items()


async def test_page_that_fits_exactly_is_the_last(Sandbox, five):
    paginator = Sandbox.list(query=SandboxQuery(metadata=five[0]), limit=5)
    assert len(await paginator.next_items()) == 5
    assert not paginator.has_next


async def test_token_continues_elsewhere(Sandbox, five):
    mark, sandboxes = five
    query = SandboxQuery(metadata=mark)
    first = Sandbox.list(query=query, limit=3)
    seen = ids(await first.next_items())
    rest = await all_items(Sandbox.list(query=query, limit=3, next_token=first.next_token))
    assert seen + ids(rest) == ids(reversed(sandboxes))


async def test_pages_hold_while_sandboxes_come_and_go(Sandbox, create):
    mark = {"suite": uuid.uuid4().hex}
    old = [await create(metadata=mark) for _ in range(3)]
    paginator = Sandbox.list(query=SandboxQuery(metadata=mark), limit=1)
    assert ids(await paginator.next_items()) == [old[2].sandbox_id]
    await create(metadata=mark)
    await old[2].kill()
    assert ids(await all_items(paginator)) == [old[1].sandbox_id, old[0].sandbox_id]


async def test_oldest_first(Sandbox, five):
    mark, sandboxes = five
    listed = await all_items(Sandbox.list(query=SandboxQuery(metadata=mark), order="asc", limit=2))
    assert ids(listed) == ids(sandboxes)


async def test_metadata_must_all_match(Sandbox, five):
    mark, sandboxes = five
    odd = await all_items(Sandbox.list(query=SandboxQuery(metadata={**mark, "parity": "odd"})))
    assert set(ids(odd)) == {sandboxes[1].sandbox_id, sandboxes[3].sandbox_id}
    assert await all_items(Sandbox.list(query=SandboxQuery(metadata={**mark, "parity": "neither"}))) == []
    assert await all_items(Sandbox.list(query=SandboxQuery(metadata={**mark, "absent": "odd"}))) == []


async def test_metadata_with_every_delimiter(Sandbox, five):
    mark, sandboxes = five
    query = SandboxQuery(metadata={**mark, "odd name & more": "50% +é=/?#"})
    assert set(ids(await all_items(Sandbox.list(query=query)))) == set(ids(sandboxes))


@pytest.mark.parametrize(
    "states, expected",
    [
        ([SandboxState.RUNNING], 5),
        ([SandboxState.PAUSED], 0),
        ([SandboxState.RUNNING, SandboxState.PAUSED], 5),
    ],
)
async def test_states(Sandbox, five, states, expected):
    listed = await all_items(Sandbox.list(query=SandboxQuery(metadata=five[0], state=states)))
    assert len(listed) == expected


async def test_started_after(Sandbox, five):
    mark, sandboxes = five
    third = await sandboxes[2].get_info()
    listed = await all_items(Sandbox.list(query=SandboxQuery(metadata=mark, started_after=third.started_at)))
    assert set(ids(listed)) == set(ids(sandboxes[2:]))


async def test_template_by_name_and_by_id(Sandbox, five):
    mark, sandboxes = five
    template_id = (await sandboxes[0].get_info()).template_id
    for template, expected in (("base", 5), (template_id, 5), ("no-such-template", 0)):
        query = SandboxQuery(metadata=mark, template=template)
        assert len(await all_items(Sandbox.list(query=query))) == expected, template


async def test_killed_sandboxes_are_not_listed(Sandbox, create):
    mark = {"suite": uuid.uuid4().hex}
    sandbox = await create(metadata=mark)
    await sandbox.kill()
    assert await all_items(Sandbox.list(query=SandboxQuery(metadata=mark))) == []


async def test_bad_token_is_refused(Sandbox):
    with pytest.raises(SandboxException) as refused:
        await Sandbox.list(next_token="not-a-token").next_items()
    assert refused.value.status_code == 400
