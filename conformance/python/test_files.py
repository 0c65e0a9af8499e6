"""`sandbox.files`: contents, directories, owners, names."""

import asyncio
import hashlib
import io
import os
from datetime import datetime, timedelta, timezone

import pytest
from e2b import (
    FileNotFoundException,
    FileType,
    InvalidArgumentException,
    NotFoundException,
    SandboxException,
)

AWKWARD_NAMES = [
    "with space",
    "grüße-日本語-🫙",
    "100% sure?",
    "a&b=c;d",
    "#hash+plus",
    "quote'and\"quote",
    "back\\slash",
    "-dash",
    ".hidden",
    "x" * 255,
]


async def sha256_inside(sandbox, path):
    result = await sandbox.commands.run("sha256sum < " + path)
    return result.stdout.split()[0]


class TestContents:
    async def test_text(self, sandbox, directory):
        path = f"{directory}/text"
        written = await sandbox.files.write(path, "Grüße\n€ 🫙\r\n")
        assert (written.name, written.path, written.type) == ("text", path, FileType.FILE)
        assert await sandbox.files.read(path) == "Grüße\n€ 🫙\r\n"

    async def test_bytes(self, sandbox, directory):
        data = bytes(range(256)) * 17
        await sandbox.files.write(f"{directory}/bytes", data)
        assert bytes(await sandbox.files.read(f"{directory}/bytes", format="bytes")) == data

    async def test_stream(self, sandbox, directory):
        data = os.urandom(3_000_000)
        await sandbox.files.write(f"{directory}/stream", io.BytesIO(data))
        chunks = [chunk async for chunk in await sandbox.files.read(f"{directory}/stream", format="stream")]
        assert b"".join(chunks) == data

    @pytest.mark.parametrize("octet_stream", [False, True])
    async def test_empty(self, sandbox, directory, octet_stream):
        await sandbox.files.write(f"{directory}/empty", "", use_octet_stream=octet_stream)
        assert await sandbox.files.read(f"{directory}/empty") == ""
        assert (await sandbox.files.get_info(f"{directory}/empty")).size == 0

    @pytest.mark.parametrize("octet_stream", [False, True])
    async def test_both_ways_to_upload(self, sandbox, directory, octet_stream):
        # A body that looks like the multipart framing around it.
        data = b'--boundary\r\nContent-Disposition: form-data; name="file"\r\n\r\n\x00\xff--boundary--\r\n'
        written = await sandbox.files.write(f"{directory}/data", data, use_octet_stream=octet_stream)
        assert written.path == f"{directory}/data"
        assert bytes(await sandbox.files.read(f"{directory}/data", format="bytes")) == data

    async def test_compressed(self, sandbox, directory):
        text = "the same line over and over\n" * 10_000
        await sandbox.files.write(f"{directory}/text", text, gzip=True)
        assert (await sandbox.files.get_info(f"{directory}/text")).size == len(text)
        assert await sandbox.files.read(f"{directory}/text", gzip=True) == text

    async def test_overwriting_shortens(self, sandbox, directory):
        await sandbox.files.write(f"{directory}/file", "a long first version")
        await sandbox.files.write(f"{directory}/file", "short")
        assert await sandbox.files.read(f"{directory}/file") == "short"

    async def test_overwriting_keeps_the_mode(self, sandbox, directory):
        await sandbox.files.write(f"{directory}/script", "#!/bin/sh\necho one\n")
        await sandbox.commands.run(f"chmod 755 {directory}/script")
        await sandbox.files.write(f"{directory}/script", "#!/bin/sh\necho two\n")
        assert (await sandbox.commands.run(f"{directory}/script")).stdout == "two\n"

    async def test_commands_and_files_see_the_same(self, sandbox, directory):
        await sandbox.files.write(f"{directory}/in", "from outside")
        await sandbox.commands.run(f"tr a-z A-Z < {directory}/in > {directory}/out")
        assert await sandbox.files.read(f"{directory}/out") == "FROM OUTSIDE"

    @pytest.mark.timeout(300)
    async def test_hundred_megabytes_there_and_back(self, sandbox, directory):
        block = hashlib.sha256(b"belljar").digest() * 32_768
        data = b"".join(block[number:] + block[:number] for number in range(100))
        expected = hashlib.sha256(data).hexdigest()
        await sandbox.files.write(f"{directory}/large", io.BytesIO(data))
        assert await sha256_inside(sandbox, f"{directory}/large") == expected
        received = hashlib.sha256()
        async for chunk in await sandbox.files.read(f"{directory}/large", format="stream"):
            received.update(chunk)
        assert received.hexdigest() == expected
        await sandbox.files.remove(f"{directory}/large")

    async def test_twenty_side_by_side(self, sandbox, directory):
        async def round_trip(number):
            data = os.urandom(200_000)
            await sandbox.files.write(f"{directory}/{number}", data)
            return bytes(await sandbox.files.read(f"{directory}/{number}", format="bytes")) == data

        assert all(await asyncio.gather(*(round_trip(number) for number in range(20))))

    async def test_missing_file(self, sandbox):
        with pytest.raises(FileNotFoundException) as missing:
            await sandbox.files.read("/no/such/file")
        assert isinstance(missing.value, NotFoundException)
        with pytest.raises(FileNotFoundException):
            await sandbox.files.read("/no/such/file", format="stream")

    async def test_directory_is_no_file(self, sandbox, directory):
        await sandbox.files.make_dir(directory)
        with pytest.raises(InvalidArgumentException, match="directory"):
            await sandbox.files.read(directory)
        with pytest.raises(SandboxException):
            await sandbox.files.write(directory, "text")

    async def test_file_is_no_directory(self, sandbox, directory):
        await sandbox.files.write(f"{directory}/file", "")
        with pytest.raises(SandboxException):
            await sandbox.files.write(f"{directory}/file/below", "text")


class TestManyFiles:
    @pytest.mark.parametrize("octet_stream", [False, True])
    async def test_many_in_one_call(self, sandbox, directory, octet_stream):
        files = [{"path": f"{directory}/deep/{number}/file", "data": f"content {number}"} for number in range(30)]
        written = await sandbox.files.write_files(files, use_octet_stream=octet_stream)
        assert [info.path for info in written] == [file["path"] for file in files]
        for file in files:
            assert await sandbox.files.read(file["path"]) == file["data"]

    async def test_none(self, sandbox):
        assert await sandbox.files.write_files([]) == []

    async def test_text_and_bytes_and_streams(self, sandbox, directory):
        await sandbox.files.write_files(
            [
                {"path": f"{directory}/a", "data": "text"},
                {"path": f"{directory}/b", "data": b"\x00\x01"},
                {"path": f"{directory}/ü ber", "data": io.BytesIO(b"stream")},
            ]
        )
        assert await sandbox.files.read(f"{directory}/a") == "text"
        assert bytes(await sandbox.files.read(f"{directory}/b", format="bytes")) == b"\x00\x01"
        assert await sandbox.files.read(f"{directory}/ü ber") == "stream"


class TestPaths:
    async def test_relative_to_home(self, sandbox):
        assert (await sandbox.files.write("relative", "x")).path == "/home/user/relative"
        assert (await sandbox.files.write("~/tilde", "x")).path == "/home/user/tilde"
        assert (await sandbox.files.write("a/../b/./c", "x")).path == "/home/user/b/c"
        assert await sandbox.files.read("/home/user/relative") == "x"
        assert await sandbox.files.exists("~/tilde")

    async def test_relative_to_the_users_home(self, sandbox):
        assert (await sandbox.files.write("of-root", "x", user="root")).path == "/root/of-root"
        assert await sandbox.files.read("~/of-root", user="root") == "x"

    @pytest.mark.parametrize("name", AWKWARD_NAMES, ids=range(len(AWKWARD_NAMES)))
    async def test_awkward_names(self, sandbox, directory, name):
        path = f"{directory}/{name}"
        assert (await sandbox.files.write(path, name)).name == name
        assert await sandbox.files.read(path) == name
        assert [entry.path for entry in await sandbox.files.list(directory)] == [path]
        await sandbox.files.rename(path, path[:-1])
        assert (await sandbox.files.get_info(path[:-1])).name == name[:-1]
        await sandbox.files.remove(path[:-1])
        assert await sandbox.files.list(directory) == []

    async def test_name_too_long(self, sandbox, directory):
        with pytest.raises(SandboxException):
            await sandbox.files.write(f"{directory}/{'x' * 256}", "")


class TestOwners:
    async def test_default_owner(self, sandbox, directory):
        await sandbox.files.write(f"{directory}/below/file", "")
        for path in (f"{directory}/below/file", f"{directory}/below"):
            info = await sandbox.files.get_info(path)
            assert (info.owner, info.group) == ("user", "user"), path
        await sandbox.commands.run(f"echo more >> {directory}/below/file && touch {directory}/below/other")

    async def test_owner_is_the_user_named(self, sandbox, directory):
        await sandbox.files.make_dir(directory)
        await sandbox.files.write(f"{directory}/of-root", "", user="root")
        await sandbox.files.make_dir(f"{directory}/dir-of-root", user="root")
        for name in ("of-root", "dir-of-root"):
            info = await sandbox.files.get_info(f"{directory}/{name}")
            assert (info.owner, info.group) == ("root", "root"), name

    async def test_unknown_user(self, sandbox):
        with pytest.raises(Exception, match="nobody-we-know"):
            await sandbox.files.write("x", "x", user="nobody-we-know")
        with pytest.raises(Exception, match="nobody-we-know"):
            await sandbox.files.list("/", user="nobody-we-know")


class TestInfo:
    async def test_file(self, sandbox, directory):
        await sandbox.files.write(f"{directory}/file", "12345")
        info = await sandbox.files.get_info(f"{directory}/file")
        assert (info.name, info.path, info.type, info.size) == ("file", f"{directory}/file", FileType.FILE, 5)
        assert info.mode & 0o777 == 0o644
        assert info.permissions.endswith("rw-r--r--")
        assert info.symlink_target is None
        assert abs(info.modified_time.replace(tzinfo=timezone.utc) - datetime.now(timezone.utc)) < timedelta(minutes=1)

    async def test_directory(self, sandbox, directory):
        await sandbox.files.make_dir(directory)
        info = await sandbox.files.get_info(directory)
        assert (info.type, info.mode & 0o777) == (FileType.DIR, 0o755)

    async def test_symlink(self, sandbox, directory):
        await sandbox.files.write(f"{directory}/target", "behind the link")
        await sandbox.commands.run("ln -s target link && ln -s nowhere dangling", cwd=directory)
        info = await sandbox.files.get_info(f"{directory}/link")
        assert info.type == FileType.SYMLINK
        assert info.symlink_target in ("target", f"{directory}/target")
        assert await sandbox.files.read(f"{directory}/link") == "behind the link"
        listed = {entry.name: entry.type for entry in await sandbox.files.list(directory)}
        assert listed == {"target": FileType.FILE, "link": FileType.SYMLINK, "dangling": FileType.SYMLINK}

    async def test_missing(self, sandbox, directory):
        with pytest.raises(FileNotFoundException):
            await sandbox.files.get_info(directory)

    async def test_exists(self, sandbox, directory):
        await sandbox.files.write(f"{directory}/file", "")
        assert await sandbox.files.exists(f"{directory}/file") is True
        assert await sandbox.files.exists(directory) is True
        assert await sandbox.files.exists(f"{directory}/other") is False
        assert await sandbox.files.exists(f"{directory}/file/below") is False

    async def test_metadata(self, sandbox, directory):
        path = f"{directory}/file"
        written = await sandbox.files.write(path, "x", metadata={"Author": "Ada", "step": "1 of 2"})
        assert written.metadata == {"author": "Ada", "step": "1 of 2"}
        assert (await sandbox.files.get_info(path)).metadata == {"author": "Ada", "step": "1 of 2"}
        await sandbox.files.write(path, "x")
        assert (await sandbox.files.get_info(path)).metadata is None


class TestDirectories:
    async def test_make(self, sandbox, directory):
        assert await sandbox.files.make_dir(f"{directory}/a/b/c") is True
        assert await sandbox.files.make_dir(f"{directory}/a/b/c") is False
        assert await sandbox.files.make_dir(f"{directory}/a/b") is False

    async def test_make_over_a_file(self, sandbox, directory):
        await sandbox.files.write(f"{directory}/file", "")
        with pytest.raises(InvalidArgumentException):
            await sandbox.files.make_dir(f"{directory}/file")

    async def test_list(self, sandbox, directory):
        await sandbox.files.write(f"{directory}/b", "12")
        await sandbox.files.write(f"{directory}/a/below", "")
        entries = {entry.name: entry for entry in await sandbox.files.list(directory)}
        assert set(entries) == {"a", "b"}
        assert (entries["a"].type, entries["a"].path) == (FileType.DIR, f"{directory}/a")
        assert (entries["b"].type, entries["b"].size, entries["b"].owner) == (FileType.FILE, 2, "user")

    @pytest.mark.parametrize(
        "depth, expected", [(1, ["1"]), (2, ["1", "1/2"]), (3, ["1", "1/2", "1/2/3"]), (9, ["1", "1/2", "1/2/3", "1/2/3/file"])]
    )
    async def test_list_to_a_depth(self, sandbox, directory, depth, expected):
        await sandbox.files.write(f"{directory}/1/2/3/file", "")
        listed = await sandbox.files.list(directory, depth=depth)
        assert sorted(entry.path for entry in listed) == [f"{directory}/{path}" for path in expected]

    async def test_list_of_an_empty_directory(self, sandbox, directory):
        await sandbox.files.make_dir(directory)
        assert await sandbox.files.list(directory) == []

    async def test_list_of_the_root(self, sandbox):
        assert {"bin", "etc", "home", "usr"} <= {entry.name for entry in await sandbox.files.list("/")}

    async def test_list_of_thousands(self, sandbox, directory):
        await sandbox.files.make_dir(directory)
        await sandbox.commands.run("seq 5000 | xargs touch", cwd=directory)
        assert len(await sandbox.files.list(directory)) == 5000

    async def test_list_of_what_is_none(self, sandbox, directory):
        with pytest.raises(FileNotFoundException):
            await sandbox.files.list(directory)
        await sandbox.files.write(f"{directory}/file", "")
        with pytest.raises(InvalidArgumentException):
            await sandbox.files.list(f"{directory}/file")

    async def test_links_in_a_circle(self, sandbox, directory):
        await sandbox.files.make_dir(directory)
        await sandbox.commands.run("ln -s . self", cwd=directory)
        listed = await sandbox.files.list(directory, depth=5)
        assert [entry.name for entry in listed] == ["self"]


class TestMovingAndRemoving:
    async def test_rename_file(self, sandbox, directory):
        await sandbox.files.write(f"{directory}/old", "content")
        info = await sandbox.files.rename(f"{directory}/old", f"{directory}/new")
        assert (info.name, info.path, info.type) == ("new", f"{directory}/new", FileType.FILE)
        assert await sandbox.files.read(f"{directory}/new") == "content"
        assert not await sandbox.files.exists(f"{directory}/old")

    async def test_rename_directory(self, sandbox, directory):
        await sandbox.files.write(f"{directory}/old/file", "content")
        assert (await sandbox.files.rename(f"{directory}/old", f"{directory}/new")).type == FileType.DIR
        assert await sandbox.files.read(f"{directory}/new/file") == "content"

    async def test_rename_replaces(self, sandbox, directory):
        await sandbox.files.write(f"{directory}/a", "a")
        await sandbox.files.write(f"{directory}/b", "b")
        await sandbox.files.rename(f"{directory}/a", f"{directory}/b")
        assert await sandbox.files.read(f"{directory}/b") == "a"

    async def test_rename_of_nothing(self, sandbox, directory):
        with pytest.raises(FileNotFoundException):
            await sandbox.files.rename(f"{directory}/nothing", f"{directory}/new")

    async def test_remove_file(self, sandbox, directory):
        await sandbox.files.write(f"{directory}/file", "")
        await sandbox.files.remove(f"{directory}/file")
        assert not await sandbox.files.exists(f"{directory}/file")

    async def test_remove_directory_with_all_in_it(self, sandbox, directory):
        await sandbox.files.write(f"{directory}/deep/er/file", "")
        await sandbox.files.remove(directory)
        assert not await sandbox.files.exists(directory)

    async def test_remove_link_but_not_its_target(self, sandbox, directory):
        await sandbox.files.write(f"{directory}/kept/file", "kept")
        await sandbox.commands.run("ln -s kept link", cwd=directory)
        await sandbox.files.remove(f"{directory}/link")
        assert await sandbox.files.read(f"{directory}/kept/file") == "kept"

    async def test_remove_nothing(self, sandbox, directory):
        # As `rm -rf`: what was asked for is the case.
        await sandbox.files.remove(directory)
