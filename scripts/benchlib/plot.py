"""An SVG bar chart of signatures a second: one panel a key, groups of threads, one bar a set-up."""

from __future__ import annotations

from typing import Any

COLOURS = {"softhsm": "#9aa5b1", "p11kit-softhsm": "#cbd2d9", "hsmvisor": "#1f7a8c", "hsmvisor-p11kit": "#7fb7be"}
TITLES = {
    "softhsm": "SoftHSM2 in the application",
    "p11kit-softhsm": "p11-kit server + SoftHSM2",
    "hsmvisor": "hsmvisor",
    "hsmvisor-p11kit": "hsmvisor, stock p11-kit client",
}
KEYS = {"p256": "ECDSA P-256", "rsa2048": "RSA-2048", "rsa3072": "RSA-3072", "ed25519": "Ed25519"}
WIDTH, HEIGHT, LEFT, TOP, GAP = 360, 200, 60, 60, 40


def _text(x: float, y: float, words: str, size: int = 11, anchor: str = "start", weight: str = "normal") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" font-weight="{weight}">{words}</text>'


def _threads(count: int) -> str:
    return f"{count} thread" + ("s" if count > 1 else "")


def _panel(x: float, y: float, key: str, rows: list[dict[str, Any]]) -> list[str]:
    top = max(row["ops_per_s"] for row in rows)
    threads = sorted({row["threads"] for row in rows})
    parts = [_text(x, y - 8, KEYS[key], 13, weight="bold"), _text(x + WIDTH, y - 8, f"highest: {top:,.0f} signatures/s", 10, "end")]
    parts.append(f'<line x1="{x}" y1="{y + HEIGHT}" x2="{x + WIDTH}" y2="{y + HEIGHT}" stroke="#52606d"/>')
    group = WIDTH / len(threads)
    width = group * 0.84 / len(COLOURS)
    for number, count in enumerate(threads):
        bars = [row for name in COLOURS for row in rows if (row["setup"], row["threads"]) == (name, count)]
        for place, row in enumerate(bars):
            height = HEIGHT * row["ops_per_s"] / top
            left = x + group * number + group * 0.08 + place * width
            label = f"{TITLES[row['setup']]}, {_threads(count)}: {row['ops_per_s']:,.0f}/s"
            parts.append(
                f'<rect x="{left:.1f}" y="{y + HEIGHT - height:.1f}" width="{width * 0.92:.1f}" height="{height:.1f}" '
                f'fill="{COLOURS[row["setup"]]}"><title>{label}</title></rect>'
            )
        parts.append(_text(x + group * (number + 0.5), y + HEIGHT + 16, _threads(count), 11, "middle"))
    return parts


def draw(rows: list[dict[str, Any]]) -> str:
    """Returns the text of the SVG file."""
    keys = [key for key in KEYS if any(row["key"] == key for row in rows)]
    columns = min(2, len(keys))
    lines = -(-len(keys) // columns)
    width, height = max(LEFT + columns * (WIDTH + GAP), 860), TOP + lines * (HEIGHT + 70) + 10
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" fill="#1f2933">']
    parts.append(f'<rect width="{width}" height="{height}" fill="#ffffff"/>')
    x = float(LEFT)
    for name in [n for n in COLOURS if any(row["setup"] == n for row in rows)]:
        parts.append(
            f'<rect x="{x:.1f}" y="14" width="11" height="11" fill="{COLOURS[name]}"/>' + _text(x + 16, 24, TITLES[name], 11)
        )
        x += 30 + 6.2 * len(TITLES[name])
    for number, key in enumerate(keys):
        left, top = LEFT + (number % columns) * (WIDTH + GAP), TOP + 10 + (number // columns) * (HEIGHT + 70)
        parts += _panel(left, top, key, [row for row in rows if row["key"] == key])
    return "\n".join([*parts, "</svg>", ""])
