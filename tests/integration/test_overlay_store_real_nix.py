"""Nix's check of the mount beneath an overlay store, against our copy of its rule: real overlays, real Nix."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.debian import DebianError
from tests.support.nix import fetch_nix
from tests.support.places import NoPlaceError
from veneer.formats.overlay_store import OverlayStore, mount_fault, parse_overlay_url

pytestmark = [pytest.mark.nix, pytest.mark.root]
SECONDS = 120


@dataclass(frozen=True)
class Case:
    """One overlay and the words that our copy of the rule says about it; "": nothing, and Nix takes it."""

    name: str
    words: str = ""
    source: str = "overlay"
    lower: str = "lowerdir={home}/lower/nix/store"
    upper: str = "{upper}"
    directory: str = "layer"
    merged: str = "root"
    query: str = ""
    """Instead of the right one; {good} is that."""


CASES = [
    Case("good"),
    *(
        Case(f"a fine name {name}", directory=name)
        for name in ("a.b", "a-b_c", "a|b", "a]b", "a}b", "a=b", "a#b")
    ),
    Case("a fine merged name", merged="a.b|c"),
    Case("another source", "named foo", source="foo"),
    Case("slash after lower", "exactly", lower="lowerdir={home}/lower/nix/store/"),
    Case("slash after upper", "exactly", upper="{upper}/"),
    Case("two lowers", "several", lower="lowerdir={home}/lower/nix/store:{home}/second"),
    Case("second of two lowers", "several", lower="lowerdir={home}/second:{home}/lower/nix/store"),
    Case("new API", "lowerdir+=", lower="lowerdir+={home}/lower/nix/store"),
    Case("link", "links count", lower="lowerdir={home}/link/nix/store"),
    Case("relative", "relative", lower="lowerdir=lower/nix/store"),
    *(
        Case(f"never matches {name}", "regular expression", directory=name)
        for name in ("a+b", "a*b", "a?b", "a(b)", "a[b", "a{b", "a$", "a^b")
    ),
    Case("blank", "in another form", directory="a b"),
    Case("comma", "in another form", directory="a,b"),
    Case("merged name never matches", "regular expression", merged="a+b"),
    Case("URL encoded where it need not be", query="{good}&check-mount=true"),
    Case("another upper", "upperdir is", query="{other}"),
    Case("nothing mounted", "no overlay", source=""),
]

DRIVER = """
import json, os, subprocess, sys
home, programs, environment, cases = json.loads(sys.stdin.read())
os.chdir(home)
os.makedirs("lower/nix/store"); os.makedirs("second"); os.symlink("lower", "link")
found = []
for case in cases:
    for place in (case["upper"].rstrip("/"), case["work"], case["store"]):
        os.makedirs(place, exist_ok=True)
    if case["source"]:
        upper = case["upper"].replace("\\\\", "\\\\\\\\").replace(",", "\\\\,")
        options = f"{case['lower']},upperdir={upper},workdir={case['work']}"
        subprocess.run(["mount", "-t", "overlay", case["source"], "-o", options, case["store"]], check=True)
    done = subprocess.run([programs + "/nix", "--store", case["url"], "store", "info"], env=environment,
                          capture_output=True, text=True)
    found.append([open("/proc/self/mounts", errors="surrogateescape").read(), done.returncode, done.stderr])
    if case["source"]:
        subprocess.run(["umount", case["store"]], check=True)
print(json.dumps(found))
"""


@pytest.mark.parametrize("suite", ["trixie", "sid"])
def test_nix_refuses_exactly_the_mounts_that_we_say_it_does(suite: str, open_directory: Path) -> None:
    try:
        programs = fetch_nix(suite)
    except (DebianError, NoPlaceError) as error:
        pytest.skip(f"Nix of {suite} cannot be fetched: {error}")
    home = open_directory / f"check-mount-{suite}"
    (home / "conf").mkdir(parents=True)
    (home / "conf/nix.conf").write_text(
        "experimental-features = nix-command local-overlay-store\nsubstituters =\n"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NIX_")}
    environment = kept | {"HOME": str(home), "NIX_CONF_DIR": str(home / "conf")}
    stores, plans = [], []
    for number, case in enumerate(CASES):
        upper = f"{home}/{number}/{case.directory}"
        root = f"{home}/{number}/{case.merged}"
        store = OverlayStore(f"{home}/nobody.sock", f"{home}/lower", upper, root)
        other = OverlayStore(f"{home}/nobody.sock", f"{home}/lower", upper + "-other", root)
        query = (case.query or "{good}").format(good=store.url(), other=other.url())
        stores.append(parse_overlay_url(query))
        plans.append(
            {
                "source": case.source,
                "lower": case.lower.format(home=home),
                "upper": case.upper.replace("{upper}", upper),
                "work": f"{home}/{number}/work",
                "store": store.real_store_dir,
                "url": query,
            }
        )
    done = subprocess.run(
        ["unshare", "-m", sys.executable, "-c", DRIVER],
        input=json.dumps([str(home), str(programs), environment, plans]),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr
    wrong = []
    for case, parsed, (mounts, status, said) in zip(CASES, stores, json.loads(done.stdout), strict=True):
        fault = mount_fault(mounts, parsed.real_store_dir, parsed.lower_store_dir, parsed.upper_layer)
        if (status == 0) != (case.words == ""):
            wrong.append(f"{case.name}: Nix says {status} {said}")
        if ((fault.what if fault else "") != "" and not case.words) or case.words not in (
            fault.what if fault else ""
        ):
            wrong.append(f"{case.name}: we say {fault}")
        assert parsed.faults == ()
    assert wrong == []
