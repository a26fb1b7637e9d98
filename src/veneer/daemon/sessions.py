"""Who is connected, with which view and which account.

Views are shared by equal configuration; downloads may outlive the connection that asked, so views do too. Accounts are shared by session name
within a view, so that a run's mount server and its supervisor see the same figures.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Set
from dataclasses import dataclass, field

from veneer.formats.request_wire import Frame, Kind, path_number_body, quarantined_body
from veneer.model.store_path import StorePath
from veneer.store.account import Account
from veneer.store.views import View, ViewConfig

ABSENT_KEPT = 10_000
"""Names answered ABSENT that a connection is told of when they appear, at most."""

VIEWS_KEPT = 64
"""Views that outlive their connections, with their connection pools, so that the next run finds them warm."""


@dataclass(slots=True, eq=False)
class Session:
    """One connection after HELLO. ``send`` queues a frame without waiting."""

    view: View
    account: Account
    key: tuple[str, str]
    may_control: bool
    peer: str
    send: Callable[[Frame], None]
    absent: OrderedDict[StorePath, None] = field(default_factory=OrderedDict)
    on_leave: list[Callable[[], None]] = field(default_factory=list)
    """Called once, when the connection is gone: what lived for this session ends."""
    takes_directories: bool = False
    """Whether it is enough for it that a store path is a directory."""
    open: int = 0
    """Requests that are being answered."""

    def remember_absent(self, path: StorePath) -> None:
        self.absent[path] = None
        self.absent.move_to_end(path)
        if len(self.absent) > ABSENT_KEPT:
            self.absent.popitem(last=False)


class Sessions:
    """All connections. Implements the store's notices by telling everybody whom they concern."""

    def __init__(
        self, build_view: Callable[[ViewConfig], View], downloading: Callable[[], Set[str]] = frozenset
    ) -> None:
        """``downloading``: identities of the views whose sources a download reads from."""
        self._build_view = build_view
        self._downloading = downloading
        self._views: dict[str, View] = {}
        self._accounts: dict[tuple[str, str], Account] = {}
        self.connected: set[Session] = set()

    def enter(
        self, config: ViewConfig, *, may_control: bool, peer: str, send: Callable[[Frame], None]
    ) -> Session:
        """A session for a connection that brought ``config``. VeneerError when the configuration is wrong."""
        identity = config.identity()
        view = self._views.get(identity)
        if view is None:
            view = self._views[identity] = self._build_view(config)
        key = (identity, config.session)
        account = self._accounts.setdefault(key, Account())
        session = Session(view, account, key, may_control, peer, send)
        self.connected.add(session)
        return session

    async def leave(self, session: Session) -> None:
        """The connection is gone; its account goes with the last that uses it."""
        self.connected.discard(session)
        for end in session.on_leave:
            end()
        if all(other.key != session.key for other in self.connected):
            self._accounts.pop(session.key, None)
        while (
            identity := self._superfluous()
        ) is not None:  # anew each time: a session may enter during the await
            await self._views.pop(identity).close()

    async def close(self) -> None:
        """Close every view."""
        while self._views:
            await self._views.popitem()[1].close()

    def _superfluous(self) -> str | None:
        """A view to close: above VIEWS_KEPT, of no connection, and without a download that others may wait for."""
        if len(self._views) <= VIEWS_KEPT:
            return None
        in_use = {other.view.identity for other in self.connected} | self._downloading()
        return next((identity for identity in self._views if identity not in in_use), None)

    def dropped(self, number: int) -> None:
        self._tell(Frame(Kind.DROPPED, 0, path_number_body(number)))

    def condemned(self, number: int, path: StorePath) -> None:
        self._tell(Frame(Kind.QUARANTINED, 0, quarantined_body(number, path.basename)))

    def present(self, path: StorePath) -> None:
        for session in self.connected:
            if path in session.absent:
                del session.absent[path]
                session.send(Frame(Kind.PRESENT, 0, path.basename.encode("ascii")))

    def _tell(self, frame: Frame) -> None:
        for session in self.connected:
            session.send(frame)
