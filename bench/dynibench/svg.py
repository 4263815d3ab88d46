"""A plot of figures with their ranges, as SVG, written by hand: no library is needed to look at it or to make it."""

import math
from xml.sax.saxutils import escape, quoteattr

# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
WIDTH, HEIGHT = 720, 420
LEFT, RIGHT, TOP, BOTTOM = 64, 150, 48, 92


def plot(title, caption, axes, labels, series, joined=True):
    """
    `axes`: what x and y are; `labels`: the places on x; `series`: `{name: [figure or None, one for each label]}`, a figure
    being `{"median", "low", "high"}`. `joined`: whether a series' medians are one line.
    """
    figures = [figure for row in series.values() for figure in row if figure]
    ticks = scale(min([1.0, *(f["low"] for f in figures)]), max([1.0, *(f["high"] for f in figures)]))
    x = lambda n, shift=0: LEFT + (WIDTH - LEFT - RIGHT) * (n + 0.5) / max(len(labels), 1) + shift
    y = lambda value: HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - ticks[0]) / (ticks[-1] - ticks[0])
    words = wrapped(caption, 112)
    height = max(HEIGHT, HEIGHT - 28 + 14 * len(words))
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="12" '
           f'role="img" aria-label={quoteattr(title)}>',
           f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
           text(LEFT, 26, title, 'font-size="16"')]
    for tick in ticks:
        width = 1.5 if math.isclose(tick, 1) else 0.5
        out.append(line(LEFT, y(tick), WIDTH - RIGHT, y(tick), f'stroke="#888888" stroke-width="{width}"'))
        out.append(text(LEFT - 8, y(tick) + 4, f"{tick:.2f}", 'text-anchor="end"'))
    out += [text(x(n), HEIGHT - BOTTOM + 18, label, 'text-anchor="middle"') for n, label in enumerate(labels)]
    out.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - BOTTOM + 38, axes[0], 'text-anchor="middle"'))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    out.append(text(16, middle, axes[1], f'text-anchor="middle" transform="rotate(-90 16 {middle:.1f})"'))
    for k, (name, row) in enumerate(series.items()):
        colour = COLOURS[k % len(COLOURS)]
        # Ranges of several series at one place stand side by side.
        shift = 8 * (k - (len(series) - 1) / 2)
        points = [(x(n, shift), figure) for n, figure in enumerate(row) if figure]
        if joined and len(points) > 1:
            path = " ".join(f"{px:.1f},{y(f['median']):.1f}" for px, f in points)
            out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for px, f in points:
            out.append(line(px, y(f["low"]), px, y(f["high"]), f'stroke="{colour}" stroke-width="1.5"'))
            out.append(f'<circle cx="{px:.1f}" cy="{y(f["median"]):.1f}" r="4" fill="{colour}">'
                       f"<title>{escape(name)} {f['median']:.3f}</title></circle>")
        out.append(f'<circle cx="{WIDTH - RIGHT + 16}" cy="{TOP + 10 + 20 * k}" r="4" fill="{colour}"/>')
        out.append(text(WIDTH - RIGHT + 26, TOP + 14 + 20 * k, name))
    for n, row in enumerate(words):
        out.append(text(LEFT - 48, HEIGHT - 36 + 14 * n, row, 'font-size="11" fill="#444444"'))
    return "\n".join([*out, "</svg>"]) + "\n"


def text(x, y, words, style=""):
    """A line of text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(words)}</text>'


def line(x1, y1, x2, y2, style):
    """A straight line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {style}/>'


def wrapped(words, width):
    """A caption in lines."""
    lines = [""]
    for word in words.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def scale(low, high):
    """Round values for an axis that holds `low` and `high`: at most ten steps of 1, 2 or 5 hundredths, tenths and so on."""
    step = next(size * power for power in (0.01, 0.1, 1, 10, 100, 1000) for size in (1, 2, 5)
                if (high - low) / (size * power) <= 8 or (power, size) == (1000, 5))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, max(last, first + 1) + 1)]
