"""Real Nix inside an environment: it takes the caches' paths for its own, builds on them and cleans up only after itself."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.callers import Caller
from tests.support.nginx import Nginx, nar_requests
from tests.support.nix import RealNix, fetch_nix
from tests.support.sample import EXPRESSION, SampleStore

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.nix, pytest.mark.nginx]

Serve = Callable[..., Nginx]
CONFIGURATION = """\
experimental-features = nix-command
sandbox-paths = {sandbox_paths}
substituters =
max-jobs = 2
fsync-metadata = false
"""
NEW = """\
derivation {{
  name = "new"; system = builtins.currentSystem; builder = "/bin/sh"; PATH = "/usr/bin:/bin";
  args = [ "-euc" "mkdir $out; cat {path}/1/1.txt > $out/copied; echo {path} > $out/reference" ];
}}
"""
CONTENT_ADDRESSED = """\
derivation {{
  name = "addressed"; system = builtins.currentSystem; builder = "/bin/sh"; PATH = "/usr/bin:/bin";
  __contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256";
  args = [ "-euc" "cat {path}/1/1.txt > $out" ];
}}
"""


@dataclass
class Inside:
    """Shell scripts in environments, with real Nix in PATH and an own nix.conf."""

    caller: Caller
    sample: SampleStore
    server: Nginx

    def run(self, script: str, *options: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        return self.caller.veneer("run", *options, "--", "bash", "-euc", script, timeout=timeout)

    def output(self, script: str, *options: str) -> str:
        """Standard output of a script that succeeds."""
        done = self.run(script, *options)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def expression(self, attribute: str = "many") -> Path:
        """A file with a derivation that reads the path."""
        file = self.caller.home / f"new-{secrets.token_hex(4)}.nix"
        path = f'${{builtins.storePath "{self.sample.paths[attribute]}"}}'
        file.write_text(NEW.format(path=path))
        return file


def inside(caller: Caller, sample: SampleStore, server: Nginx, suite: str) -> Inside:
    conf = caller.home / "nix-conf"
    conf.mkdir()
    sandbox_paths = " ".join(p for p in ("/bin", "/usr", "/lib", "/lib64") if Path(p).exists())
    (conf / "nix.conf").write_text(CONFIGURATION.format(sandbox_paths=sandbox_paths))
    caller.environment = {n: v for n, v in caller.environment.items() if not n.startswith("NIX_")}
    caller.environment |= {
        "NIX_CONF_DIR": str(conf),
        "HOME": str(caller.home),
        "PATH": f"{fetch_nix(suite)}:{caller.environment['PATH']}",
    }
    caller.use(server.url, key=sample.public)
    return Inside(caller, sample, server)


@pytest.fixture(params=["trixie", "sid"], ids=["2.26", "2.34"])
def nix(request: pytest.FixtureRequest, caller: Caller, nix_cache: SampleStore, nginx: Serve) -> Inside:
    """Nix with local-overlay stores, for root and for an ordinary user."""
    return inside(caller, nix_cache, nginx(nix_cache.cache()), request.param)


def test_every_path_of_the_caches_is_valid(nix: Inside) -> None:
    tops = ["several.dev", "bytes-name", "hello", "pointer"]
    paths = [nix.sample.paths[top] for top in tops]
    found = nix.output(f"nix-store --check-validity {' '.join(paths)}; nix-store -qR {' '.join(paths)}")
    assert sorted(found.split()) == sorted({path for top in tops for path in nix.sample.closure(top)})
    assert nar_requests(nix.server.requests()) == []


def test_what_nix_says_of_a_path_is_what_its_builder_said(nix: Inside) -> None:
    path = nix.sample.paths["several.dev"]
    told = json.loads(nix.output(f"nix path-info --json {path}"))
    ours = told[path] if isinstance(told, dict) else told[0]
    # --json of both versions: a mapping; the older one's own names of the hash.
    truth = json.loads(nix.sample.nix.run("nix", "path-info", "--json", path))[path]
    for key in ("narHash", "narSize", "references"):
        assert ours[key] == truth[key], key


@pytest.mark.parametrize("sandbox", ["true", "false"])
def test_a_build_on_top_lands_in_the_own_layer(nix: Inside, sandbox: str) -> None:
    file = nix.expression()
    many = nix.sample.paths["many"]
    script = f"""
        out=$(nix-build --no-out-link --option sandbox {sandbox} --option sandbox-fallback false {file})
        cat $out/copied; nix-store -q --references $out; ls /.veneer/environment/upper
    """
    lines = nix.output(script).splitlines()
    assert lines[0] == "1 1"
    assert lines[1] == many
    assert sorted(line[33:] for line in lines[2:]) == ["new", "new.drv"]


def test_a_build_whose_outputs_are_cached_moves_no_nar(nix: Inside) -> None:
    built = nix.output(f"nix-build --no-out-link {EXPRESSION} -A several.dev -A shapes").split()
    assert built == [nix.sample.paths["several.dev"], nix.sample.paths["shapes"]]
    assert nar_requests(nix.server.requests()) == []


def test_a_build_fetches_only_the_inputs_that_it_opens(nix: Inside) -> None:
    nix.output(f"nix-build --no-out-link {nix.expression('many')}")
    asked = {request.path for request in nar_requests(nix.server.requests())}
    assert len(asked) == 1


def test_garbage_collection_takes_only_what_was_built_here(nix: Inside) -> None:
    path = nix.sample.paths["shapes"]
    script = f"""
        out=$(nix-build --no-out-link {nix.expression()})
        nix-store --gc >&2
        test ! -e $out
        cat {path}/deep/er/than/most/file; nix-store --check-validity {path}; ls /.veneer/environment/upper
    """
    assert nix.output(script) == "bottom\n"


def test_a_deleted_path_of_the_caches_stays(nix: Inside) -> None:
    path = nix.sample.paths["shapes"]
    done = nix.run(f"nix-store --delete {path} || true; nix-store --check-validity {path}; cat {path}/a/1")
    assert (done.returncode, done.stdout[-1:]) == (0, "1"), done.stderr


def test_verification_finds_nothing_wrong(nix: Inside) -> None:
    path = nix.sample.paths["several.dev"]
    script = f"""
        out=$(nix-build --no-out-link {nix.expression()})
        nix-store -qR {path} >/dev/null
        nix-store --verify --check-contents; nix-store --repair-path $out; nix store optimise; cat $out/copied
    """
    assert nix.output(script).endswith("1 1\n")


def test_a_path_in_both_layers_is_served_from_below_after_it_was_deleted(nix: Inside) -> None:
    """What the remount hook is for."""
    path = nix.sample.paths["note"]
    script = f"""
        nix-store --check-validity {path}
        name=$(basename {path})
        cp {path} /.veneer/environment/upper/$name.new; mv /.veneer/environment/upper/$name.new /.veneer/environment/upper/$name
        /.veneer/remount/hook /nix/store
        nix-store --delete {path} >&2
        test ! -e /.veneer/environment/upper/$name
        cat {path}
    """
    assert nix.output(script) == "a note\n"


def test_built_paths_are_copied_out(nix: Inside, make_real_nix: Callable[[str], RealNix]) -> None:
    out_dir = nix.caller.home / "out-cache"
    built = nix.output(
        f"out=$(nix-build --no-out-link {nix.expression()}); nix copy --to file://{out_dir} $out; echo $out"
    )
    other = make_real_nix(secrets.token_hex(4))
    other.run("nix", "copy", "--no-check-sigs", "--from", f"file://{out_dir}", built.strip())
    assert (other.unpacked(built.strip()) / "copied").read_text() == "1 1\n"


def test_content_addressed_outputs_are_built_and_found_again(nix: Inside) -> None:
    file = nix.caller.home / "addressed.nix"
    file.write_text(CONTENT_ADDRESSED.format(path=f'${{builtins.storePath "{nix.sample.paths["many"]}"}}'))
    build = f"nix-build --extra-experimental-features ca-derivations --no-out-link {file}"
    first, second, content = nix.output(f"{build}; {build}; cat $({build})").splitlines()
    assert (first == second, content) == (True, "1 1")


def test_a_reference_that_no_cache_has_is_named(caller: Caller, nix_cache: SampleStore, nginx: Serve) -> None:
    cache = caller.home / "holed"
    shutil.copytree(nix_cache.cache(), cache)
    (cache / f"{nix_cache.hash_part('note')}.narinfo").unlink()
    nix = inside(caller, nix_cache, nginx(cache), "trixie")
    done = nix.run(f"nix-store -r {nix_cache.paths['shapes']}")
    assert done.returncode != 0
    assert nix_cache.basename("note") in done.stderr


def test_a_named_environment_keeps_its_paths_and_its_database(nix: Inside) -> None:
    file = nix.expression()
    first = nix.output(f"nix-build -o $HOME/result {file}; cat $HOME/result/copied", "--name", "dev").split(
        "\n"
    )
    script = f"nix-store --check-validity {first[0]}; nix-store --gc >&2; cat $HOME/result/copied"
    assert nix.output(script, "--name", "dev") == "1 1\n"
    done = nix.run(f"nix-store --check-validity {first[0]}")
    assert done.returncode != 0


def test_what_is_added_again_is_not_stored_again(nix: Inside) -> None:
    """A path that a cache has is there: neither an import nor a copy puts it into the own layer."""
    source = nix.caller.home / "import-cache"
    nix.sample.nix.copy([nix.sample.paths["shapes"]], f"file://{source}")
    script = f"""
        nix copy --no-check-sigs --from file://{source} {nix.sample.paths["shapes"]}
        ls /.veneer/environment/upper
    """
    assert nix.output(script) == ""


def test_a_damaged_path_of_the_own_layer_is_found_and_repaired(nix: Inside) -> None:
    script = f"""
        out=$(nix-build --no-out-link {nix.expression()})
        file=/.veneer/environment/upper/$(basename $out)/copied
        chmod u+w $(dirname $file) $file; echo changed > $file
        /.veneer/remount/hook /nix/store
        nix-store --verify --check-contents 2>&1 | grep -c "was modified" || true
        nix-store --repair-path $out; cat $out/copied
    """
    assert nix.output(script).splitlines() == ["1", "1 1"]


def test_a_path_that_a_cache_gets_later_becomes_valid_and_readable(
    caller: Caller, nix_cache: SampleStore, nginx: Serve
) -> None:
    cache = caller.home / "growing"
    shutil.copytree(nix_cache.cache(), cache)
    narinfo = cache / f"{nix_cache.hash_part('note')}.narinfo"
    hidden = narinfo.read_bytes()
    narinfo.unlink()
    caller.configure(negative_ttl=0.2)
    inside(caller, nix_cache, nginx(cache), "trixie")
    path = nix_cache.paths["note"]
    script = f"""
        ! nix-store --check-validity {path} 2>/dev/null; ! cat {path} 2>/dev/null
        echo absent; read line
        until nix-store --check-validity {path} 2>/dev/null && cat {path} 2>/dev/null; do :; done
    """
    process = caller.popen(caller.words("run", "--", "bash", "-euc", script))
    try:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "absent\n"
        narinfo.write_bytes(hidden)
        process.stdin.write("go on\n")
        process.stdin.flush()
        assert process.stdout.readline() == "a note\n"
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()


def test_nix_goes_on_when_the_daemon_was_killed(caller: Caller, nix_cache: SampleStore, nginx: Serve) -> None:
    inside(caller, nix_cache, nginx(nix_cache.cache()), "trixie")
    first, second = nix_cache.paths["note"], nix_cache.paths["several.dev"]
    script = f"""
        nix-store --check-validity {first}; echo up; read line
        nix-store -qR {second} || nix-store -qR {second}
    """
    process = caller.popen(caller.words("run", "--", "bash", "-euc", script))
    try:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "up\n"
        killed = caller.daemon_pid()
        os.kill(killed, signal.SIGKILL)
        process.stdin.write("go on\n")
        process.stdin.flush()
        found = process.stdout.read().split()
        assert process.wait(60) == 0, process.stderr.read() if process.stderr else ""
    finally:
        process.kill()
        process.communicate()
    assert sorted(found) == sorted(nix_cache.closure("several.dev"))


# A nix-daemon of the environment's own, for all users inside.

_WITH_BUILD_USERS = """
{ cat /etc/passwd; echo "guest:x:12345:12345::$1/guest:/bin/sh"; for i in 1 2; do echo "nixbld$i:x:$((30000 + i)):30000::/var/empty:/bin/false"; done; } > "$1/passwd"
{ cat /etc/group; echo "nixbld:x:30000:nixbld1,nixbld2"; } > "$1/group"
mkdir -p "$1/guest"; chown 12345:12345 "$1/guest"
mount --bind "$1/passwd" /etc/passwd
mount --bind "$1/group" /etc/group
shift
exec "$@"
"""


@pytest.fixture(params=["trixie", "sid"], ids=["2.26", "2.34"])
def multi_user(
    request: pytest.FixtureRequest, as_root: Caller, nix_cache: SampleStore, nginx: Serve
) -> Inside:
    """Nix for root on a machine with build users."""
    as_root.home.chmod(0o755)
    script = ["sh", "-euc", _WITH_BUILD_USERS, "sh", str(as_root.home)]
    as_root.prefix = ["unshare", "--mount", "--propagation", "private", *script]
    nix = inside(as_root, nix_cache, nginx(nix_cache.cache()), request.param)
    conf = Path(as_root.environment["NIX_CONF_DIR"]) / "nix.conf"
    conf.write_text(
        conf.read_text() + "sandbox = false\n"
    )  # inside one, every builder believes to be user 1000
    return nix


def test_an_ordinary_user_builds_through_the_environments_nix_daemon(multi_user: Inside) -> None:
    caller = multi_user.caller
    user = f"setpriv --reuid 12345 --regid 12345 --clear-groups env HOME={caller.home}/guest"
    program = shutil.which("nix-build", path=caller.environment["PATH"])
    assert program is not None
    if subprocess.run([*user.split(), "test", "-x", program]).returncode:
        pytest.skip("an ordinary user cannot reach this checkout's Nix")
    file = caller.home / "who.nix"
    script = "echo $(id -u) > $out; cat {path}/1/1.txt >> $out"
    path = f'${{builtins.storePath "{multi_user.sample.paths["many"]}"}}'
    file.write_text(NEW.format(path=path).replace("mkdir $out; ", f"{script.format(path=path)}; exit 0; "))
    lines = multi_user.output(
        f"out=$({user} nix-build --no-out-link {file}); cat $out;"
        f" stat -c %u $out; {user} nix-store --check-validity $out; test ! -w /nix/store || id -u",
        "--nix",
        "daemon",
    ).splitlines()
    assert lines[0] in ("30001", "30002")
    assert lines[1:] == ["1 1", "0", "0"]


def test_a_nix_daemon_is_for_root(unprivileged: Caller, nix_cache: SampleStore, nginx: Serve) -> None:
    nix = inside(unprivileged, nix_cache, nginx(nix_cache.cache()), "trixie")
    done = nix.run("true", "--nix", "daemon")
    assert done.returncode == 125
    assert "needs root" in done.stderr


# A Nix without local-overlay stores.


@pytest.fixture
def old_nix(caller: Caller, nix_cache: SampleStore, nginx: Serve) -> Inside:
    nix = inside(caller, nix_cache, nginx(nix_cache.cache()), "bookworm")
    hook = caller.home / "build-remote"  # a program of its own, where Debian puts it
    hook.symlink_to(fetch_nix("bookworm") / "nix")
    caller.environment |= {"NIX_CONFIG": f"build-hook = {hook}", "USER": "somebody"}
    return nix


def test_an_old_nix_takes_the_named_closures_for_valid_and_builds_on_them(old_nix: Inside) -> None:
    path = old_nix.sample.paths["many"]
    file = old_nix.expression("many")
    closure = ["--closure", path, "--closure", old_nix.sample.paths["several.dev"]]
    script = f"""
        nix-store -qR {old_nix.sample.paths["several.dev"]} | wc -l
        out=$(nix-build --no-out-link {file}); cat $out/copied
        nix-store --gc >&2; test ! -e $out; nix-store --check-validity {path}
    """
    lines = old_nix.output(script, *closure).split("\n")
    assert lines[:2] == [str(len(old_nix.sample.closure("several.dev"))), "1 1"]


def test_an_old_nix_without_named_closures_is_told_what_to_do(old_nix: Inside) -> None:
    done = old_nix.run(f"nix-store --check-validity {old_nix.sample.paths['many']}")
    assert done.returncode != 0
    assert "--closure" in done.stderr


def test_a_closure_that_no_cache_has_is_an_error(old_nix: Inside) -> None:
    done = old_nix.run("true", "--closure", f"/nix/store/{'0' * 32}-nothing")
    assert done.returncode == 125
    assert "no source has" in done.stderr
