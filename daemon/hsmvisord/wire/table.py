"""The calls of both dialects: p11-kit's signatures (p11-kit/rpc-message.h), then those of the native dialect alone (NATIVE.md)."""

from __future__ import annotations

import re

from hsmvisord.wire.calls import Call

_ROWS = """
1 ayyay -            2 - -                3 - vsusv            4 yfu au             5 u ssuvv
6 u ssssuuuuuuuuuuuvvs                    7 ufu au             8 uu uuu             9 uayz -
10 uu u              11 u -               12 u -               13 u uuuu            14 uay -
15 uayay -           16 ufy ay            17 uayuu -           18 uuay -            19 u -
20 uaA u             21 uuaA u            22 uu -              23 uu u              24 uufA aAu
25 uuaA -            26 uaA -             27 ufu au            28 u -               29 uMu -
30 uayfy ay          31 uayfy ay          32 ufy ay            33 uMu -             34 uayfy ay
35 uayfy ay          36 ufy ay            37 uM -              38 uayfy ay          39 uay -
40 uu -              41 ufy ay            42 uMu -             43 uayfy ay          44 uay -
45 ufy ay            46 uMu -             47 uayfy ay          48 uMu -             49 uayay -
50 uay -             51 uay -             52 uMu -             53 uayfy ay          54 uayfy ay
55 uayfy ay          56 uayfy ay          57 uayfy ay          58 uMaA u            59 uMaAaA uu
60 uMuufy ay         61 uMuayaA u         62 uMuaA u           63 uay -             64 ufy ay
65 u u               66 uuayay -          67 uu -              68 uMu -             72 u -
73 uMu -             77 u -               78 uMu -             79 uayayfy ay        80 uay -
81 uayayNy ay        82 u -               83 uMu -             84 uayayay -         85 uay -
86 uayayay -         87 u -               88 uays -            89 uMuaA uPu
256 yyayuzu ayyuuuu  257 au au            258 uMuayfy ay       259 uMuayfy ay       260 uaAu auyu
261 uMuayay -        262 uMayfy ay        263 u u
264 uMayayfy ayayay  265 uMay ay          266 uMayfyu ayay     267 uMayayfy ay      268 uMay -
269 uMayfyu ay       270 uMuay -          271 uay -            272 uay -            273 u -
274 uMuaAfy ayu      275 uMuayaA u        276 uMuuayfy ayayay  277 uMuayaAay u      278 uu u
279 uMuayfy ay
"""

#: One field code of a signature.
Fields = tuple[str, ...]

_FIELD = re.compile(r"ay|au|fy|fu|Ny|aA|fA|[uyvszMP]")


def split(signature: str) -> Fields:
    return tuple(_FIELD.findall(signature)) if signature != "-" else ()


def _rows() -> dict[Call, tuple[Fields, Fields]]:
    words = _ROWS.split()
    return {Call(int(c)): (split(q), split(r)) for c, q, r in zip(words[::3], words[1::3], words[2::3], strict=True)}


#: Call -> the fields of its request and of its reply.
CALLS: dict[Call, tuple[Fields, Fields]] = _rows()

#: The same as text, as p11-kit sends them in each message.  It calls `Ny` a `fy` too.
SIGNATURES: dict[Call, tuple[bytes, bytes]] = {
    call: ("".join(request).replace("N", "f").encode(), "".join(reply).encode()) for call, (request, reply) in CALLS.items()
}

#: p11-kit sends the parameters of message-based encryption as memory with pointers in it (its calls 69-71 and 74-76): nobody can
#: serve that, so neither can begin there.
_NO_PARAMETERS = {Call.MESSAGE_ENCRYPT_INIT, Call.MESSAGE_ENCRYPT_FINAL, Call.MESSAGE_DECRYPT_INIT, Call.MESSAGE_DECRYPT_FINAL}
P11KIT_CALLS = frozenset(call for call in CALLS if call < Call.HELLO) - _NO_PARAMETERS
NATIVE_CALLS = frozenset(CALLS) - {Call.INITIALIZE, Call.INIT_TOKEN2, Call.DERIVE_KEY2}
