"""The steps of a new root, without a machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from veneer.environment import plan as p
from veneer.environment.facts import Entry, HostFacts, read_facts
from veneer.environment.spec import NixSpec, RunSpec
from veneer.model.errors import UsageError

BARE = HostFacts(
    root=(
        Entry("bin", "link", "usr/bin"),
        Entry("home", "directory"),
        Entry("proc", "directory"),
        Entry("stamp", "file"),
        Entry("tmp", "directory"),
    ),
    staging="/tmp",
    store=None,
    store_in_place=False,
    store_parent=None,
    store_siblings=(),
    nearest="/",
    environment="/home/u/environments/dev",
    needs_user_namespace=True,
    restricted_overlay=True,
    has_build_group=False,
)
WITH_STORE = replace(
    BARE,
    root=(*BARE.root, Entry("nix", "directory")),
    store="/nix/store",
    store_in_place=True,
    store_parent="/nix",
    nearest="/nix/store",
)
LINKED_STORE = replace(
    WITH_STORE,
    root=(*BARE.root, Entry("nix", "link", "home/nix")),
    store="/home/nix/store",
    store_in_place=False,
    store_parent="/home/nix",
    store_siblings=(Entry("store", "directory"), Entry("var", "directory")),
)


def spec(store_dir: str = "/nix/store") -> RunSpec:
    return RunSpec(("true",), Path("/cache"), None, Path("/environments"), 1.0, {}, "/", store_dir)


def targets(steps: list[p.Step], kind: type[p.Step]) -> list[str]:
    return [step.target for step in steps if isinstance(step, kind) and hasattr(step, "target")]


def test_nothing_is_made_outside_the_new_root() -> None:
    """Until the root is entered, only the fresh tmpfs is written to; the host's tree is only ever a source."""
    for facts in (BARE, WITH_STORE, LINKED_STORE):
        steps = p.plan(facts, spec())
        entered = steps.index(p.EnterRoot("/tmp", p.HOST))
        assert steps[0] == p.CutPropagation()
        assert steps[1] == p.MountMemory("/tmp")
        assert all(isinstance(s, p.MakeDir) and s.path.startswith("/tmp/.veneer") for s in steps[2:entered])
        for step in steps[entered + 1 :]:
            if isinstance(step, p.MakeDir | p.MakeFile | p.MakeLink):
                assert not step.path.startswith(f"{p.HOST}/")


def test_every_entry_of_the_host_root_appears_as_what_it_is() -> None:
    steps = p.plan(BARE, spec())
    assert p.MakeLink("/bin", "usr/bin") in steps
    assert p.Bind("/.veneer/host/home", "/home", optional=True) in steps
    assert p.MakeFile("/stamp") in steps
    assert p.MountProc("/proc", "/.veneer/host/proc") in steps


def test_store_without_a_host_store_has_one_lower_layer() -> None:
    steps = p.plan(BARE, spec())
    (overlay,) = [step for step in steps if isinstance(step, p.MountOverlay)]
    assert overlay == p.MountOverlay("/nix/store", ("/.veneer/lower/nix/store",), p.UPPER, p.WORK, True)
    assert p.MountMemory("/nix") in steps


def test_host_store_is_a_second_lower_layer_and_its_directory_stays() -> None:
    steps = p.plan(WITH_STORE, spec())
    (overlay,) = [step for step in steps if isinstance(step, p.MountOverlay)]
    assert overlay.lowers == ("/.veneer/lower/nix/store", "/.veneer/host-store")
    assert p.Bind("/.veneer/host/nix", "/nix", optional=True) in steps
    assert "/nix" not in targets(steps, p.MountMemory)


def test_store_behind_a_link_gets_a_real_directory_with_its_siblings() -> None:
    """Nix refuses links on the way to the store, and /proc/self/mounts would show another path."""
    steps = p.plan(LINKED_STORE, spec())
    assert not [step for step in steps if isinstance(step, p.MakeLink) and step.path == "/nix"]
    assert p.Bind("/.veneer/host/home/nix/var", "/nix/var", optional=True) in steps
    assert p.Bind("/.veneer/host/home/nix/store", p.HOST_STORE) in steps
    assert "/nix/store" not in targets(steps, p.Bind)


def test_lower_answers_before_the_overlay_and_the_host_is_let_go_after() -> None:
    kinds = [type(step) for step in p.plan(WITH_STORE, spec())]
    order = [p.EnterRoot, p.MountLower, p.MountOverlay, p.Detach, p.MakeReadOnly]
    assert [kind for kind in kinds if kind in order] == order


def test_upper_and_work_come_with_one_mount() -> None:
    assert p.Bind("/.veneer/host/home/u/environments/dev", p.ENVIRONMENT) in p.plan(BARE, spec())
    steps = p.plan(replace(BARE, environment=None), spec())
    at = steps.index(p.MountMemory(p.ENVIRONMENT))
    assert steps[at : at + len(p.memory_layers())] == p.memory_layers()


def test_directory_is_made_before_something_is_mounted_on_it() -> None:
    for facts in (BARE, WITH_STORE, LINKED_STORE):
        steps = p.plan(facts, spec())
        there = {"/", "/tmp", p.HOST}
        for step in steps:
            if isinstance(step, p.MakeDir | p.MakeFile):
                assert str(Path(step.path).parent) in there | {"/tmp/.veneer"} | {"/tmp"}
                there.add(step.path)
                there.add(step.path.removeprefix("/tmp"))
            elif isinstance(step, p.Bind | p.MountLower | p.MountMemory | p.MountProc):
                assert step.target in there
                if step.target == "/nix":
                    there.add("/nix/store")


@pytest.mark.parametrize("nearest", ["/home", "/home/u"])
def test_place_that_would_hide_files_of_the_host_is_refused(nearest: str) -> None:
    facts = replace(BARE, store_parent=None, nearest=nearest)
    with pytest.raises(UsageError) as caught:
        p.plan(facts, spec("/home/u/nix/store"))
    assert caught.value.hint == "mkdir -p /home/u/nix/store"


def test_nested_environment_hides_the_outer_ones_own_directory() -> None:
    facts = replace(BARE, root=(Entry(".veneer", "directory"), *BARE.root))
    assert "/.veneer" not in targets(p.plan(facts, spec()), p.Bind)


def test_this_machine_can_be_read() -> None:
    facts = read_facts("/nix-that-is-not/there/store", None)
    assert Entry("proc", "directory") in facts.root
    assert facts.nearest == "/"
    assert facts.store is None
    assert not facts.store_in_place
    assert p.plan(facts, spec("/nix-that-is-not/there/store"))


@pytest.mark.parametrize(
    "path", ["nix/store", "/nix/", "/store", "/nix/../store", "/nix/a b", "/nix/a:b", "/nix/a,b", ""]
)
def test_store_directory_that_a_mount_option_cannot_hold_is_refused(path: str) -> None:
    with pytest.raises(UsageError):
        spec(path)


@pytest.mark.parametrize("name", ["", "tmp-x", "../x", "a/b", ".hidden", "-x", "a" * 65, "a\n"])
def test_name_that_is_no_directory_name_is_refused(name: str) -> None:
    with pytest.raises(UsageError):
        replace(spec(), name=name)


def test_nix_reaches_its_socket_by_the_directory_and_has_a_remount_hook() -> None:
    """A daemon that is started again makes the socket anew: a bound socket file would be the dead one."""
    steps = p.plan(BARE, replace(spec(), nix=NixSpec(Path("/cache/nix/a.sock"))))
    assert p.Bind(p.HOST + "/cache/nix", p.NIX_SOCKETS) in steps
    hook = next(step for step in steps if isinstance(step, p.MakeScript))
    assert hook.path == p.REMOUNT_HOOK
    assert [step.path for step in steps if isinstance(step, p.MakeFifo)] == [p.REMOUNT_ASK, p.REMOUNT_DONE]
    assert steps.index(hook) < steps.index(p.MakeReadOnly("/"))


def test_without_nix_there_is_nothing_of_it() -> None:
    steps = p.plan(BARE, spec())
    assert not [step for step in steps if isinstance(step, p.MakeScript | p.MakeFifo)]
    assert p.NIX_SOCKETS not in targets(steps, p.Bind)
