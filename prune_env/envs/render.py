"""Draws the plan so far: one bar per group with what is kept, gone and still open, and the budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from prune_env.envs.dynamics import Outlook, Problem, State, counts, outlook
from prune_env.pruning.measure import Measurement

WIDTH, HEIGHT = 960, 540
MARGIN, TOP, BASE, FOOT = 48, 92, 360, 468
INK, PALE, GRID, PAPER = (32, 36, 44), (128, 136, 148), (228, 231, 236), (255, 255, 255)
KEPT, GONE, OPEN, FIXED, NEXT = (38, 110, 180), (214, 226, 238), (243, 244, 246), (150, 158, 170), (230, 140, 30)
LEFT, LIMIT = (150, 205, 160), (200, 48, 48)
COLUMNS = 32


@dataclass(frozen=True)
class Bar:
    """One group, ready to be drawn.

    Attributes:
        name: Group name.
        kept: Channels kept (or all, while open).
        channels: Channels of the dense network.
        state: `kept`, `next`, `open`, or `fixed` for a group that is not decided.
    """

    name: str
    kept: int
    channels: int
    state: str

    @property
    def share(self) -> float:
        """Share of the channels kept."""
        return self.kept / self.channels


def bars(problem: Problem, state: State) -> list[Bar]:
    """One bar per group of the graph, in forward order."""
    places = {group: place for place, group in enumerate(problem.steps)}
    kept = counts(problem, state).tolist()

    def kind(group: int) -> str:
        place = places.get(group)
        if place is None:
            return "fixed"
        return "kept" if place < state.position else "next" if place == state.position else "open"

    return [Bar(group.name, kept[i], group.channels, kind(i)) for i, group in enumerate(problem.graph.groups)]


def title(problem: Problem, state: State, pruned: Measurement | None) -> str:
    """One line: what, how far, and what came of it."""
    head = f"{problem.name}  {problem.resource} budget {state.budget.fraction:.3f}  "
    if pruned is None:
        return head + f"step {state.position} of {len(problem.steps)}"
    return head + f"accuracy {pruned.accuracy:.4f} (dense {problem.dense.accuracy:.4f})"


def ledger(problem: Problem, ahead: Outlook) -> dict[str, float]:
    """The budget as shares of the dense network: spent, forced (open groups at their minimum) and left."""
    amounts = {"spent": ahead.spent, "forced": ahead.forced, "left": ahead.left}
    return {name: amount / problem.total for name, amount in amounts.items()}


def draw_text(problem: Problem, state: State, pruned: Measurement | None = None) -> str:
    """The plan so far as text."""
    ahead = outlook(problem, state)
    drawn = bars(problem, state)
    wide = max(len(bar.name) for bar in drawn)
    lines = [title(problem, state, pruned)]
    for bar in drawn:
        full = max(1, round(bar.share * COLUMNS)) if bar.state in ("kept", "fixed") else 0
        fill = "█" * full + ("░" if bar.state in ("kept", "fixed") else "·") * (COLUMNS - full)
        said = {
            "kept": f"{bar.kept:5d} of {bar.channels:<5d}{bar.share:.3f}",
            "fixed": f"{bar.kept:5d} left whole",
            "next": f"{bar.channels:5d} <- next" + _range(ahead),
            "open": f"{bar.channels:5d} open",
        }[bar.state]
        lines.append(f"  {bar.name:<{wide}}  {fill}  {said}")
    numbers = "  ".join(f"{name} {value:.3f}" for name, value in ledger(problem, ahead).items())
    lines.append(f"  {problem.resource}: {numbers}  budget {state.budget.fraction:.3f}")
    return "\n".join(lines)


def draw_picture(problem: Problem, state: State, pruned: Measurement | None = None) -> UInt8[np.ndarray, "h w 3"]:
    """The plan so far as a picture."""
    image = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    pen = ImageDraw.Draw(image)
    pen.text((MARGIN, 18), title(problem, state, pruned), INK, _font(20))
    _legend(pen)
    _draw_axis(pen)
    ahead = outlook(problem, state)
    _draw_bars(image, pen, bars(problem, state), ahead=ahead)
    _draw_ledger(pen, ledger(problem, ahead), problem.resource, limit=state.budget.fraction)
    return np.array(image)


RENDERERS: dict[str, Callable[[Problem, State, Measurement | None], str | np.ndarray]] = {
    "ansi": draw_text,
    "rgb_array": draw_picture,
}


def _range(ahead: Outlook) -> str:
    """Counts that may be kept now."""
    return f" ({ahead.feasible[0]} to {ahead.feasible[-1]})" if len(ahead.feasible) else ""


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font."""
    return ImageFont.load_default(size)


def _legend(pen: ImageDraw.ImageDraw) -> None:
    """What the colours of the bars mean."""
    left = MARGIN
    for word, colour in (("kept", KEPT), ("gone", GONE), ("may be kept", NEXT), ("open", OPEN), ("left whole", FIXED)):
        pen.rectangle((left, 56, left + 14, 70), fill=colour, outline=PALE)
        pen.text((left + 20, 55), word, INK, _font(13))
        left += 44 + int(pen.textlength(word, _font(13)))


def _draw_axis(pen: ImageDraw.ImageDraw) -> None:
    """Lines at keep 0, .25, .5, .75, 1."""
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        height = BASE - share * (BASE - TOP)
        pen.line((MARGIN, height, WIDTH - MARGIN / 2, height), fill=GRID)
        pen.text((MARGIN - 6, height), f"{share:.2f}", PALE, _font(11), anchor="rm")


def _draw_bars(image: Image.Image, pen: ImageDraw.ImageDraw, drawn: list[Bar], *, ahead: Outlook) -> None:
    """One upright bar per group, the height being the share of its channels; the next one shows what it may be."""
    pitch = (WIDTH - 1.5 * MARGIN) / len(drawn)
    half = max(0.5, min(0.40 * pitch, 28.0))
    # A name or a number needs about 13 pixels; where bars stand closer, only some are labelled.
    every = max(1, int(np.ceil(13 / pitch)))
    for i, bar in enumerate(drawn):
        middle = MARGIN + (i + 0.5) * pitch
        left, right = middle - half, middle + half
        top = BASE - bar.share * (BASE - TOP)
        if bar.state in ("next", "open"):
            pen.rectangle((left, TOP, right, BASE), fill=OPEN, outline=GRID)
            if bar.state == "next":
                most = BASE - ahead.feasible[-1] / bar.channels * (BASE - TOP)
                pen.rectangle((left, most, right, BASE), fill=NEXT)
        else:
            pen.rectangle((left, TOP, right, BASE), fill=GONE)
            pen.rectangle((left, top, right, BASE), fill=KEPT if bar.state == "kept" else FIXED)
        if pitch >= 24 and bar.state == "kept":
            pen.text((middle, max(top, TOP + 14) - 2), str(bar.kept), INK, _font(11), anchor="mb")
        if i % every == 0:
            _label(image, bar.name, middle=middle)


def _label(image: Image.Image, name: str, *, middle: float) -> None:
    """A group's name, upright below its bar."""
    tag = _tag(name)
    image.paste(tag, (int(middle) - tag.width // 2, BASE + 5))


@cache
def _tag(name: str) -> Image.Image:
    """A name turned by 90 degrees; its end tells layers of one network apart, so the start is what is cut off."""
    short = name if len(name) <= 15 else "…" + name[-14:]
    wide = int(_font(11).getlength(short)) + 1
    tag = Image.new("RGB", (wide, 13), PAPER)
    ImageDraw.Draw(tag).text((0, 0), short, INK, _font(11))
    return tag.rotate(90, expand=True)


def _draw_ledger(pen: ImageDraw.ImageDraw, shares: Mapping[str, float], resource: str, *, limit: float) -> None:
    """The budget: spent, forced and left on a scale from nothing to the dense network."""
    long = WIDTH - 1.5 * MARGIN
    pen.rectangle((MARGIN, FOOT, MARGIN + long, FOOT + 22), fill=OPEN, outline=GRID)
    start, place = 0.0, MARGIN
    for (word, share), colour in zip(shares.items(), (KEPT, FIXED, LEFT), strict=True):
        end = min(1.0, start + max(share, 0.0))
        if end > start:
            pen.rectangle((MARGIN + start * long, FOOT, MARGIN + end * long, FOOT + 22), fill=colour)
        pen.rectangle((place, FOOT + 36, place + 12, FOOT + 48), fill=colour, outline=PALE)
        pen.text((place + 18, FOOT + 34), f"{resource} {word} {share:.3f}", INK, _font(13))
        start, place = end, place + 180
    line = MARGIN + limit * long
    pen.line((line, FOOT - 7, line, FOOT + 29), fill=LIMIT, width=3)
    pen.rectangle((place, FOOT + 36, place + 3, FOOT + 48), fill=LIMIT)
    pen.text((place + 10, FOOT + 34), f"{resource} budget {limit:.3f}", LIMIT, _font(13))
