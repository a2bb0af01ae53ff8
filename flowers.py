"""The built-in pictures: flowers drawn by a formula, as many as one likes, at any size.

Class c has c + 3 petals, 3 to 12. With captions a quarter of all combinations of colour and number
of petals is never shown, so that a prompt can ask for something new.
"""
import math

import numpy as np
import torch

from schedule import height_width
from uvit import Condition

PETALS = {
    "red": (.86, .12, .15), "orange": (.97, .50, .10), "yellow": (.99, .83, .17),
    "white": (.97, .95, .92), "pink": (.97, .50, .67), "magenta": (.82, .16, .55),
    "purple": (.52, .26, .75), "blue": (.26, .42, .89)}
GROUNDS = {
    "green": (.18, .36, .20), "dark green": (.06, .17, .12), "brown": (.30, .21, .15),
    "blue": (.55, .72, .85), "grey": (.45, .47, .48), "cream": (.90, .86, .74),
    "night blue": (.08, .10, .22)}
DISCS = {
    "yellow": (.98, .78, .15), "brown": (.36, .20, .10), "green": (.55, .65, .20),
    "dark": (.14, .09, .12)}


NUMBERS = "three four five six seven eight nine ten eleven twelve".split()


def never_shown(colour, petals):
    """Whether flowers with captions never have this combination."""
    return (list(PETALS).index(colour) + petals) % 4 == 0


def distance(x, y):
    return np.sqrt(x * x + y * y)


def pick(rng, table, names):
    name = list(names)[rng.integers(len(names))]
    colour = np.clip(np.array(table[name]) + rng.uniform(-.06, .06, 3), 0, 1)
    return name, colour.astype(np.float32)


def draw_flower(rng, petals, res, colours=PETALS):
    """A flower seen from above, drawn by formulas, its edges equally sharp at every resolution.

    rng: numpy Generator; petals: 3 to 12; res: size, d or "HxW"; colours: names to choose from ->
    picture: (H, W, 3) float32 in [0, 1], caption: str.
    All petals are one petal, folded by angle: turned by 2 pi / petals the flower is itself again.
    """
    H, W = height_width(res)
    res = min(H, W)                         # the shorter side spans [-1, 1]

    def cover(depth):                       # anti-aliased: 1 inside, 0 outside, one pixel wide
        return np.clip(.5 + depth * (res / 2), 0, 1)

    petal_name, tip = pick(rng, PETALS, colours)
    ground_name, ground = pick(rng, GROUNDS, GROUNDS)
    _, disc = pick(rng, DISCS, DISCS)
    base = np.clip(tip * rng.uniform(.35, 1.15) + rng.uniform(-.1, .2), 0, 1).astype(np.float32)
    length, turn, twist = rng.uniform(.62, .88), rng.uniform(0, 2 * np.pi), rng.uniform(-.35, .35)
    x0, y0 = rng.uniform(-.12, .12, 2).tolist()
    p, q = rng.uniform(.5, 1.1), rng.uniform(.3, .9)    # outline s^p (1 - s)^q: round to pointed

    # float32 and colours first, (3, H, W): numpy is four times as fast as the other way round.
    x = ((np.arange(W, dtype=np.float32) + .5) * 2 - W)[None, :] / res
    y = ((np.arange(H, dtype=np.float32) + .5) * 2 - H)[:, None] / res
    tip, base, ground, disc = (colour[:, None, None] for colour in (tip, base, ground, disc))

    picture = background(rng, x, y, ground, W / res, H / res)

    # Polar coordinates, the angle folded into one petal's sector; u runs along the petal, w across.
    r = distance(x - x0, y - y0)
    theta = np.arctan2(y - y0, x - x0) + turn + twist * r
    phi = np.mod(theta, 2 * np.pi / petals) - np.pi / petals
    u, w = r * np.cos(phi), np.abs(r * np.sin(phi))
    s = np.clip(u / length, 1e-4, 1 - 1e-4)

    # Half-width of the petal, at most as wide as its sector where it is widest.
    widest = p / (p + q)
    half = min(.42 * length, rng.uniform(.72, 1.0) * widest * length * math.tan(np.pi / petals))
    width = half * (s / widest) ** p * ((1 - s) / (1 - widest)) ** q
    picture *= 1 - .35 * np.clip(1 - (r / length - .5) / .7, 0, 1)      # its shadow
    light = petal_light(rng, np.clip(w / width, 0, 1), s)
    speckled = rng.random() < .5
    for at, aside in rng.uniform((.35, .05), (.75, .6), (4 * speckled, 2)).tolist():
        at_width = half * (at / widest) ** p * ((1 - at) / (1 - widest)) ** q
        light *= 1 - .55 * cover(.022 - distance(u - at * length, w - aside * at_width))
    petal = (base + (tip - base) * s ** .7) * light
    picture += cover(np.minimum(width - w, length - u)) * (petal - picture)

    # The disc in the middle: rings of grains, as many to a ring as keep the symmetry.
    radius = length * rng.uniform(.17, .26)
    around = petals * (1 + 12 // petals)
    grains = .5 + .5 * np.cos(5 * np.pi * r / radius) * np.cos(around * theta)
    shade = (.72 + .42 * grains) * (1 - .35 * np.clip(r / radius, 0, 1) ** 4)
    picture += cover(radius - r) * (disc * shade - picture)

    caption = flower_caption(rng, petal_name, petals, "pointed " if q > .65 else "round ",
                             speckled, ground_name)
    return np.clip(picture, 0, 1).transpose(1, 2, 0), caption


def background(rng, x, y, ground, width, height):
    """A soft gradient and three discs out of focus."""
    angle = rng.uniform(0, 2 * np.pi)
    picture = ground * (1 + .25 * (math.cos(angle) * x + math.sin(angle) * y))
    for bx, by, radius, light in rng.uniform((-1, -1, .1, -.06), (1, 1, .35, .10), (3, 4)).tolist():
        off = distance(x - bx * width, y - by * height)
        picture += light * np.clip((radius - off) / (.4 * radius), 0, 1)
    return picture


def petal_light(rng, across, along):
    """Darker towards the edge and the middle of the flower, with veins; both are 0 to 1."""
    light = 1 - .38 * across * across * across - .10 * (1 - along)
    veins = int(rng.integers(2, 5))
    vein = .5 + .5 * np.cos(2 * np.pi * veins * across)
    return light * (1 - .16 * (vein * vein * vein) ** 2 * (along < .93))


def flower_caption(rng, colour, petals, shape, speckled, ground):
    """Some captions say more than others; numbers are words or figures."""
    count = NUMBERS[petals - 3] if rng.random() < .5 else str(petals)
    shape = shape if rng.random() < .5 else ""
    rest = f"{', speckled,' if speckled else ''} on {ground}" if rng.random() < .5 else ""
    return f"a {colour} flower with {count} {shape}petals{rest}"


class Flowers:
    """Endless flowers, indexed as data.py says. tokens: caption -> list of numbers, or None;
    portrait: half of them stand upright and are turned by 90 degrees.
    """

    names, unread, code = [], {}, 0

    def __init__(self, res, seed=0, tokens=None, portrait=False):
        self.res, self.seed, self.tokens, self.portrait = res, seed, tokens, portrait
        self.classes = [] if tokens else [f"{k} petals" for k in range(3, 13)]

    def __getitem__(self, n):
        rng = np.random.default_rng((self.seed, n))
        number, res, colours = int(rng.integers(10)), self.res, PETALS
        rotated = self.portrait and rng.random() < .5
        if rotated:
            res = "{1}x{0}".format(*height_width(res))
        if self.tokens:
            colours = [colour for colour in PETALS if not never_shown(colour, number + 3)]
        picture, caption = draw_flower(rng, number + 3, res, colours)
        picture = np.rot90(picture, int(rotated)).copy()
        tokens = self.tokens(caption) if self.tokens else []
        x = torch.from_numpy(picture).permute(2, 0, 1)
        x = (x * 255).round().to(torch.uint8)
        return x, Condition(-1 if self.tokens else number, int(rotated), tokens), {}
