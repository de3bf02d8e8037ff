"""The manager's tables.  Times are seconds since 1970, 0 = never; names are texts as hsmvisor.manager.ca.names writes them.

A change here comes with a migration (migrations/versions); a test compares the two.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Float, ForeignKey, Index, Integer, LargeBinary, MetaData, String, Table, Text

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

#: The built-in authorities: their own certificates.
authorities = Table(
    "ca_authorities",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("root", LargeBinary, nullable=False),
    Column("intermediate", LargeBinary, nullable=False),
    Column("made_at", BigInteger, nullable=False),
    Column("crl_number", BigInteger, nullable=False, default=0),
)

#: What they issued.  `order_id`: the same order is issued once.
certificates = Table(
    "ca_certificates",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("authority", String(64), ForeignKey("ca_authorities.name"), nullable=False),
    Column("order_id", String(64), nullable=False),
    Column("serial", String(40), nullable=False),  # hexadecimal
    Column("profile", String(64), nullable=False),
    Column("names", Text, nullable=False),  # one a line
    Column("der", LargeBinary, nullable=False),
    Column("not_before", BigInteger, nullable=False),
    Column("not_after", BigInteger, nullable=False),
    Column("revoked_at", BigInteger, nullable=False, default=0),
    Column("reason", String(32), nullable=False, default=""),
    Index("uq_ca_certificates_order", "authority", "order_id", unique=True),
    Index("uq_ca_certificates_serial", "authority", "serial", unique=True),
    Index("ix_ca_certificates_revoked", "authority", "revoked_at"),
)

# ---- the inventory --------------------------------------------------------------------------------------------------------

#: Hosts that have joined.  `id`: SHA-256 of the host's identity key, hexadecimal.
hosts = Table(
    "hosts",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("name", String(64), nullable=False, unique=True),
    Column("host_key", LargeBinary, nullable=False),
    Column("pin", LargeBinary, nullable=False),  # of its id and name, under a key that is not in the database: it has joined
    Column("state", String(16), nullable=False),  # joined, revoked
    Column("trusted", Integer, nullable=False),
    Column("owners", Text, nullable=False),  # whose guests it may report, one a line; empty: everybody's
    Column("certificate", LargeBinary, nullable=False),  # DER: the only one that counts, beside the one before
    Column("certificate_before", LargeBinary, nullable=False),
    Column("certificate_ends_at", BigInteger, nullable=False),
    Column("joined_at", BigInteger, nullable=False),
    Column("seen_at", BigInteger, nullable=False),
    Column("version", String(64), nullable=False),
    Column("session", String(64), nullable=False),  # what it told since it started counts
    Column("number", BigInteger, nullable=False),  # of its last exchange
    Column("away", Integer, nullable=False),  # its silence was told
)

#: One-time secrets for hosts.  No secret stands here: it is made of the manager's key and the id.
join_tokens = Table(
    "join_tokens",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("host", String(64), nullable=False),  # the name that it is for; empty: any
    Column("owners", Text, nullable=False),
    Column("replaces", Integer, nullable=False),
    Column("created_by", String(200), nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("used_at", BigInteger, nullable=False),
    Column("used_by", String(64), nullable=False),  # the host's id
)

#: Computing resources, as hosts report them.  `id`: HOST/NAME.
resources = Table(
    "resources",
    metadata,
    Column("id", String(130), primary_key=True),
    Column("host_id", String(64), ForeignKey("hosts.id"), nullable=False),
    Column("name", String(64), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("owner", String(128), nullable=False),
    Column("attributes", Text, nullable=False),  # JSON object of texts
    Column("present", Integer, nullable=False),
    Column("first_seen_at", BigInteger, nullable=False),
    Column("changed_at", BigInteger, nullable=False),
    Column("module", String(64), nullable=False),
    Column("module_id", String(32), nullable=False),  # hexadecimal; empty: it has none that obeys our root
    Column("recipient", LargeBinary, nullable=False),  # HPKE public key, as its host certified it
    Column("identity", LargeBinary, nullable=False),  # with the host's signature: verified before a key is sealed
    Column("obeys", Integer, nullable=False),
    Column("sequence", BigInteger, nullable=False),  # the highest that was given to a command for this module
    Index("ix_resources_host_id", "host_id", "module"),
    Index("ix_resources_name", "name"),
    Index("ix_resources_owner", "owner"),
)

#: The same attributes, to be searched.
resource_attributes = Table(
    "resource_attributes",
    metadata,
    Column("resource_id", String(130), ForeignKey("resources.id", ondelete="CASCADE"), primary_key=True),
    Column("key", String(64), primary_key=True),
    Column("value", String(256), nullable=False),
    Index("ix_resource_attributes_value", "key", "value"),
)

# ---- what is wanted ---------------------------------------------------------------------------------------------------------

requests = Table(
    "requests",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("owner", String(128), nullable=False),
    Column("groups", Text, nullable=False),  # of the owner when it asked, one a line
    Column("material", String(64), nullable=False),
    Column("spec", Text, nullable=False),  # JSON: hsmvisor.manager.wanted.spec
    Column("state", String(16), nullable=False),  # active, cancelled
    Column("kept", Integer, nullable=False),  # cancelled, and what was delivered stays
    Column("created_at", BigInteger, nullable=False),
    Column("changed_at", BigInteger, nullable=False),
    Index("uq_requests_material", "owner", "material", unique=True),
)

#: Resources that requests name one by one.
request_resources = Table(
    "request_resources",
    metadata,
    Column("request_id", String(32), ForeignKey("requests.id", ondelete="CASCADE"), primary_key=True),
    Column("resource_id", String(130), primary_key=True),
    Index("ix_request_resources_resource_id", "resource_id"),
)

#: And by attributes.
request_selectors = Table(
    "request_selectors",
    metadata,
    Column("request_id", String(32), ForeignKey("requests.id", ondelete="CASCADE"), primary_key=True),
    Column("key", String(64), primary_key=True),
    Column("value", String(256), nullable=False),
    Index("ix_request_selectors_value", "key", "value"),
)

#: What policy refused, as long as it does.
denials = Table(
    "denials",
    metadata,
    Column("request_id", String(32), ForeignKey("requests.id", ondelete="CASCADE"), primary_key=True),
    Column("resource_id", String(130), primary_key=True),
    Column("action", String(16), primary_key=True),
    Column("why", Text, nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("at", BigInteger, nullable=False),
)

# ---- what there is ------------------------------------------------------------------------------------------------------------

#: One key with its generations: of one resource, or shared by all of a request (then `resource_id` is empty).
lines = Table(
    "lines",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("request_id", String(32), ForeignKey("requests.id", ondelete="CASCADE"), nullable=False),
    Column("resource_id", String(130), nullable=False),
    Column("material", String(64), nullable=False),
    Column("look_at", Float(53), nullable=False),  # when the engine looks at it the next time
    Column("lease_by", String(64), nullable=False),  # the manager that looks at it now
    Column("lease_until", Float(53), nullable=False),
    Column("stage", String(16), nullable=False),
    Column("why", Text, nullable=False),
    Column("newest", Integer, nullable=False),  # generation number
    Column("serving", Integer, nullable=False),  # 0: none
    Column("failures", Integer, nullable=False),
    Column("failed_at", Float(53), nullable=False),
    Column("not_before", Float(53), nullable=False),
    Column("triggered_at", Float(53), nullable=False),
    Column("trigger", Text, nullable=False),  # JSON: urgent, revoke, reason, rekey, why, by
    Column("changed_at", Float(53), nullable=False),
    Index("uq_lines_resource", "request_id", "resource_id", unique=True),
    Index("ix_lines_look_at", "look_at", "resource_id"),
    Index("ix_lines_resource_id", "resource_id"),
)

generations = Table(
    "generations",
    metadata,
    Column("line_id", String(32), ForeignKey("lines.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("state", String(16), nullable=False),  # keying, ordered, issued, serving, superseded, rolled-back, failed
    Column("key_of", Integer, nullable=False),  # the generation whose key it has: its own, or an earlier one's
    Column("public_key", LargeBinary, nullable=False),
    Column("csr", LargeBinary, nullable=False),
    Column("names", Text, nullable=False),  # one a line
    Column("authority", String(64), nullable=False),
    Column("kept", Text, nullable=False),  # what the authority has to remember
    Column("chain", Text, nullable=False),  # PEM
    Column("serial", String(40), nullable=False),
    Column("not_before", BigInteger, nullable=False),
    Column("not_after", BigInteger, nullable=False),
    Column("drawn", Float(53), nullable=False),  # 0 to 1: where in the window for its renewal
    Column("window", Text, nullable=False),  # JSON: what the authority suggests
    Column("ask_at", Float(53), nullable=False),  # when to ask for that again
    Column("created_at", Float(53), nullable=False),
    Column("activated_at", Float(53), nullable=False),
    Column("revoked_at", BigInteger, nullable=False),  # known to be
    Column("revoke", String(32), nullable=False),  # why it is to be, until it is; with a ! before it at once
    Column("revoke_at", Float(53), nullable=False),  # not before then: its authority could not the last time
    Column("signatures", BigInteger, nullable=False),
    Column("urgent", Integer, nullable=False),  # those before end at once
    Column("released", Integer, nullable=False),  # may be activated although not all have staged it
    Column("checked", Integer, nullable=False),  # its health: 0 not yet, 1 good, 2 bad
    Column("told", Integer, nullable=False),  # 1: that it nears its end, 2: that it has expired
    Column("why", Text, nullable=False),
    Index("ix_generations_not_after", "state", "not_after"),
)

#: A line's material on one resource.
deliveries = Table(
    "deliveries",
    metadata,
    Column("line_id", String(32), ForeignKey("lines.id", ondelete="CASCADE"), primary_key=True),
    Column("resource_id", String(130), primary_key=True),
    Column("staged", Integer, nullable=False),  # the newest generation that the module acknowledged
    Column("active", Integer, nullable=False),  # the one that serves there
    Column("held", Text, nullable=False),  # generations that are there: "3:current 2:retiring"
    Column("state", String(16), nullable=False),  # pending, staged, active, unmeasured, denied, leaving, gone
    Column("why", Text, nullable=False),
    Column("changed_at", BigInteger, nullable=False),
    Column("failures", Integer, nullable=False),  # in a row: the module, or its host, refused; its guest's boot was wrong
    Column("failed_at", Float(53), nullable=False),
    Column("permitted", Text, nullable=False),  # JSON: what policy said when the module was told to take it
    Index("ix_deliveries_resource_id", "resource_id"),
)

#: Keys on their way, sealed to one module each.
envelopes = Table(
    "envelopes",
    metadata,
    Column("line_id", String(32), ForeignKey("lines.id", ondelete="CASCADE"), primary_key=True),
    Column("generation", Integer, primary_key=True),
    Column("resource_id", String(130), primary_key=True),
    Column("module_id", String(32), nullable=False),
    Column("envelope", LargeBinary, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Index("ix_envelopes_expires_at", "expires_at"),
)

#: Keys that owners asked to keep, wrapped by the issuer's key provider.
escrows = Table(
    "escrows",
    metadata,
    Column("line_id", String(32), ForeignKey("lines.id", ondelete="CASCADE"), primary_key=True),
    Column("generation", Integer, primary_key=True),
    Column("wrapped", LargeBinary, nullable=False),
    Column("at", BigInteger, nullable=False),
)

#: Signed commands for hosts to carry out; and what they are asked of a guest's boot (action attest; then `signed` is the question).
commands = Table(
    "commands",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("host_id", String(64), nullable=False),
    Column("resource_id", String(130), nullable=False),
    Column("module", String(64), nullable=False),
    Column("line_id", String(32), nullable=False),
    Column("generation", Integer, nullable=False),
    Column("action", String(16), nullable=False),
    Column("sequence", BigInteger, nullable=False),
    Column("signed", LargeBinary, nullable=False),
    Column("created_at", Float(53), nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("give_until", Float(53), nullable=False),  # it is given to its host until then, 0: as long as it is valid
    Index("ix_commands_host_id", "host_id", "created_at", "sequence"),
    Index("ix_commands_line_id", "line_id"),
    Index("ix_commands_resource_id", "resource_id"),
    Index("ix_commands_expires_at", "expires_at"),
)

#: What a guest's boot was, as the TPM of its module attested it.  `id`: of the command by which its host was asked.
measurements = Table(
    "measurements",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("resource_id", String(130), nullable=False),
    Column("module_id", String(32), nullable=False),
    Column("nonce", LargeBinary, nullable=False),
    Column("pcrs", String(80), nullable=False),  # that were asked for: "0 4 7"
    Column("asked_at", Float(53), nullable=False),
    Column("told_at", Float(53), nullable=False),
    Column("found", Text, nullable=False),  # JSON: their values, hexadecimal; empty: none were attested
    Column("why", Text, nullable=False),  # why not
    Column("attestation", LargeBinary, nullable=False),
    Column("certificates", LargeBinary, nullable=False),  # of the TPM: TpmCertificates; empty: its host told none
    Index("ix_measurements_resource_id", "resource_id", "asked_at"),
    Index("ix_measurements_asked_at", "asked_at"),
)

# ---- what happened, and who may do what --------------------------------------------------------------------------------------

events = Table(
    "events",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("at", Float(53), nullable=False),
    Column("kind", String(32), nullable=False),
    Column("owner", String(128), nullable=False),
    Column("request_id", String(32), nullable=False),
    Column("material", String(64), nullable=False),
    Column("resource_id", String(130), nullable=False),
    Column("host_id", String(64), nullable=False),
    Column("detail", Text, nullable=False),  # JSON object
    Index("ix_events_kind", "kind", "id"),
    Index("ix_events_owner", "owner", "id"),
    Index("ix_events_request_id", "request_id", "id"),
    Index("ix_events_resource_id", "resource_id", "id"),
)

#: Events on their way to those who asked to be told.
notices = Table(
    "notices",
    metadata,
    Column("event_id", BigInteger, primary_key=True),
    Column("channel", String(64), primary_key=True),
    Column("next_at", Float(53), nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("lease_until", Float(53), nullable=False),
    Column("failure", Text, nullable=False),
    Index("ix_notices_next_at", "next_at"),
)

policies = Table(
    "policies",
    metadata,
    Column("version", Integer, primary_key=True, autoincrement=True),
    Column("text", Text, nullable=False),
    Column("uploaded_at", BigInteger, nullable=False),
    Column("uploaded_by", String(200), nullable=False),
    Column("comment", String(300), nullable=False),
)

#: Access tokens: no token stands here, its hash does.
tokens = Table(
    "tokens",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("hash", LargeBinary, nullable=False),
    Column("owner", String(128), nullable=False),
    Column("groups", Text, nullable=False),
    Column("roles", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("created_by", String(200), nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("revoked_at", BigInteger, nullable=False),
)

#: Answers to changing calls, by request id: the same call again is answered again.
answers = Table(
    "answers",
    metadata,
    Column("request_id", String(64), primary_key=True),
    Column("method", String(64), nullable=False),
    Column("digest", LargeBinary, nullable=False),
    Column("answer", LargeBinary, nullable=False),
    Column("at", BigInteger, nullable=False),
    Index("ix_answers_at", "at"),
)

#: What all managers of the fleet have the same, by fingerprints: root, authority, token-key.
fleet = Table(
    "fleet",
    metadata,
    Column("name", String(32), primary_key=True),
    Column("fingerprint", String(64), nullable=False),  # SHA-256, hexadecimal
    Column("made_at", BigInteger, nullable=False),
)

managers = Table(
    "managers",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("name", String(64), nullable=False),
    Column("seen_at", Float(53), nullable=False),
)
