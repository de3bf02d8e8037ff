"""Sends mails by SMTP."""

from __future__ import annotations

import contextlib
import logging
import smtplib
import socket
from collections.abc import Callable, Sequence
from email.message import EmailMessage
from typing import Any

from hsmvisor.manager.history import cleaning
from hsmvisor.manager.history.happened import Event
from hsmvisor.manager.notify import limits, mails, secrets
from hsmvisor.manager.notify.calls import Connection, call
from hsmvisor.manager.notify.channels import Mail
from hsmvisor.manager.notify.errors import Undelivered
from hsmvisor.manager.notify.webhook import failure, tls_context

_log = logging.getLogger(__name__)


class MailSender:
    at_once = 1
    digests = True

    def __init__(self, channel: Mail, clock: Callable[[], float], seconds: float = limits.WHOLE) -> None:
        self.channel, self._clock, self._seconds = channel, clock, seconds

    async def send(self, events: Sequence[Event]) -> None:
        """Sends one mail for all of them.  Raises Undelivered."""
        made = mails.mail(self.channel, events, self._clock())
        refused = await call(lambda connection: self._send(connection, made), self._seconds)
        if refused:  # the others have it: once more would be twice for them
            _log.warning("mail %s: the server refuses %d of %d recipients", self.channel.name, refused, len(self.channel.to))

    def _send(self, connection: Connection, made: EmailMessage) -> int:
        """Returns how many recipients were refused.  In a thread."""
        password = secrets.password(self.channel.password_file) if self.channel.user else ""
        try:
            with contextlib.closing(self._session(connection)) as session:
                if password:
                    session.login(self.channel.user, password)
                refused = session.send_message(made, self.channel.sender, self.channel.to)
                with contextlib.suppress(smtplib.SMTPException, OSError):  # it has the mail
                    session.quit()
                return len(refused)
        except smtplib.SMTPException as error:
            raise Undelivered(_said(error, password)) from None
        except (OSError, ValueError) as error:
            raise Undelivered(failure(error)) from None

    def _session(self, connection: Connection) -> _Session:
        channel = self.channel
        context = tls_context(channel.ca_file) if channel.tls != "none" else None
        line = connection.open(channel.host, channel.real_port)
        session = _Session(channel.host)
        try:
            session.sock = line
            if channel.tls == "tls" and context is not None:
                session.sock = context.wrap_socket(line, server_hostname=channel.host)
            session.greet()
            if channel.tls == "starttls" and context is not None:
                session.starttls(context=context)
                session.ehlo()
        except BaseException:
            session.close()
            line.close()
            raise
        return session


class _Session(smtplib.SMTP):
    """On a connection that is there; what the server says is bounded."""

    def __init__(self, host: str) -> None:
        super().__init__(local_hostname=_own_name())
        self._host = host  # whose certificate starttls() expects
        self._left = limits.MAX_REPLIES

    def greet(self) -> None:
        code, said = self.getreply()
        if code != 220:
            raise smtplib.SMTPConnectError(code, said)
        self.ehlo_or_helo_if_needed()

    def getreply(self) -> tuple[int, bytes]:
        if self.file is None:
            assert self.sock is not None
            self.file = _Bounded(self.sock.makefile("rb"), self)
        return super().getreply()

    def take(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise smtplib.SMTPServerDisconnected("the server says too much")


class _Bounded:
    def __init__(self, file: Any, session: _Session) -> None:
        self._file, self._session = file, session

    def readline(self, most: int) -> bytes:
        line: bytes = self._file.readline(most)
        self._session.take(len(line))
        return line

    def close(self) -> None:
        self._file.close()


def _own_name() -> str:
    name = socket.gethostname()
    return name if name.isascii() and name.isprintable() and " " not in name else "localhost"


def _said(error: smtplib.SMTPException, password: str) -> str:
    """What the server said, but for what could be the password: it knows it."""
    match error:
        case smtplib.SMTPAuthenticationError():
            return f"the server refuses the user or the password ({error.smtp_code})"
        case smtplib.SMTPRecipientsRefused():
            codes = sorted({code for code, _ in error.recipients.values()})
            return f"the server refuses all recipients ({', '.join(map(str, codes))})"
        case smtplib.SMTPResponseException():
            said = error.smtp_error.decode("utf-8", "replace") if isinstance(error.smtp_error, bytes) else str(error.smtp_error)
            said = "" if password and password in said else f": {cleaning.text(said, limits.MAX_FAILURE)}"
            return f"the server answered with {error.smtp_code}{said}"
        case smtplib.SMTPNotSupportedError():
            return "the server does not offer what is needed (STARTTLS, or a way to log in)"
    return f"the server ended the session ({type(error).__name__})"
